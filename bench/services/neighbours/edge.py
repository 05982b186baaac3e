"""An edge (before a scheduler) or a scheduler (before an executor): the upstream end of links, requests in a closed
loop."""

from __future__ import annotations

import random
import time
from typing import Any

from bench.services.neighbours.h2 import Connection, Stream, connect
from bench.services.neighbours.tally import Tally
from bench.services.neighbours.wire import SubmitFrames, age
from scalellm.v1 import link_pb2


class LinkEdge:
    """Keeps `streams` requests open on one link; the next one is sent when one has ended.

    Args:
        address: host:port of the service.
        path: `/scalellm.v1.Scheduler/Connect` or `/scalellm.v1.Executor/Execute`.
        stamped: True if tokens say when they were sent (the far neighbour is simulated, too).
    """

    def __init__(self, address: str, path: str, stamped: bool) -> None:
        self._address = address
        self._path = path
        self._stamped = stamped
        self._tally = Tally()
        self._connection: Connection | None = None
        self._stream: Stream
        self._sent: dict[int, float] = {}
        self._credit = 0
        self._waiting: list[int] = []
        self._number = 0

    async def start(self, streams: int, prompt_len: int, max_tokens: int, sessions: bool = False) -> None:
        """Open the link and send the first requests, which end at different times."""
        self._frames = SubmitFrames(prompt_len)
        self._max_tokens = max_tokens
        self._sessions = sessions
        self._submitted = self._credit = 0
        rng = random.Random(streams)
        self._first_lengths = [rng.randint(1, max_tokens) for _ in range(streams)]
        self._waiting = list(range(streams))
        self._sent.clear()
        self._connection = await connect(self._address)
        self._stream = self._connection.call(self._path)
        self._stream.on_message = self._on_message
        self._stream.on_end = self._on_end
        hello = link_pb2.Hello(client_id=f"bench-{time.monotonic_ns()}", api_minor=1)
        self._stream.send(link_pb2.ClientFrame(hello=hello).SerializeToString())

    def take(self) -> dict[str, Any]:
        """Counts since the last call."""
        return self._tally.take()

    async def stop(self) -> None:
        """Drop the link, and with it all requests."""
        if self._connection is not None:
            self._stream.on_end = lambda: None
            self._connection.close()
            self._connection = None

    def _on_end(self) -> None:
        self._tally.counts["errors"] += max(1, len(self._sent))

    def _on_message(self, message: bytes) -> None:
        frame = link_pb2.ServerFrame.FromString(message)
        counts = self._tally.counts
        if frame.HasField("welcome"):
            self._credit = frame.welcome.load.granted_requests
            self._submit_waiting()
            return
        step = frame.step
        tokens = len(step.token_ids)
        if tokens:
            counts["tokens"] += tokens
            counts["messages"] += 1
            if self._stamped:
                self._tally.observe("latency", age(step.token_ids[0]))
        if step.finished:
            now = time.perf_counter()
            for finish in step.finished:
                counts["requests" if finish.status.code == 0 else "errors"] += 1
                self._tally.observe("request", now - self._sent.pop(finish.handle))
                self._waiting.append(finish.handle)
        if step.HasField("load") and step.load.HasField("granted_requests"):
            self._credit = step.load.granted_requests
        if self._waiting:
            self._submit_waiting()

    def _submit_waiting(self) -> None:
        now = time.perf_counter()
        while self._waiting and self._submitted < self._credit:
            handle = self._waiting.pop()
            self._number += 1
            self._submitted += 1
            self._sent[handle] = now
            length = self._first_lengths.pop() if self._first_lengths else self._max_tokens
            session_id = f"session-{self._number % 100_000}" if self._sessions else ""
            self._stream.send(self._frames.make(handle, self._number, length, session_id))
