"""Clients of the HTTP API: streamed completions in a closed loop, each on a connection of its own."""

from __future__ import annotations

import asyncio
import random
import re
import time

from bench.services.neighbours.closed_loop import ClosedLoop
from bench.services.neighbours.wire import STAMPED, CompletionRequests, age
from scalellm.services.common.addresses import split_address

_COMPLETION_TOKENS = re.compile(rb'"completion_tokens":(\d+)')
_TOKEN_IDS = re.compile(rb'"token_ids":\[(\d+)')
_LAST_CHUNK = b"\r\n0\r\n\r\n"


class _Connection(asyncio.Protocol):
    """Sends one request after the other. As HTTP goes, its reader is as cheap as `h2` is.

    What it looks for stands in every event of a completion: a finish_reason that is null (a part of the text), a usage
    (the last event before [DONE]). Each part counts as one token until the usage says how many they were.
    """

    def __init__(self, clients: HttpClients, place: int, first_tokens: int) -> None:
        self._clients = clients
        self._place = place
        self._max_tokens = first_tokens
        self._transport: asyncio.Transport
        self._rest = b""
        self._num_tokens = 0
        self._sent = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._send()

    def connection_lost(self, exc: Exception | None) -> None:
        self._clients.count_error()

    def close(self) -> None:
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        *events, self._rest = (self._rest + data).split(b"\n\n")
        for event in events:
            if b'"finish_reason":null' in event:
                self._on_text(event)
            elif (usage := _COMPLETION_TOKENS.search(event)) is not None:
                self._clients.tally.counts["tokens"] += int(usage[1]) - self._num_tokens
        if self._rest == _LAST_CHUNK:
            self._clients.tally.observe("request", time.perf_counter() - self._sent)
            self._clients.tally.counts["requests"] += 1
            self._max_tokens = self._clients.max_tokens
            self._send()
        elif not events and b"\r\n\r\n" in self._rest and not self._rest.startswith(b"HTTP/1.1 200 "):
            self._transport.abort()  # a refusal

    def _send(self) -> None:
        self._rest = b""
        self._num_tokens = 0
        self._last = 0.0
        self._sent = time.perf_counter()
        stamps = self._clients.stamped and self._place % STAMPED == 0
        self._transport.write(self._clients.next_request(self._max_tokens, stamps=stamps))

    def _on_text(self, event: bytes) -> None:
        now, tally = time.perf_counter(), self._clients.tally
        tally.counts["messages"] += 1
        tally.counts["tokens"] += 1
        self._num_tokens += 1
        if self._last:
            tally.observe("itl", now - self._last)
        else:
            tally.observe("ttft", now - self._sent)
        self._last = now
        if (stamp := _TOKEN_IDS.search(event)) is not None:
            tally.observe("latency", age(int(stamp[1])))


class HttpClients(ClosedLoop[_Connection]):
    """Keeps `streams` completions running.

    Attributes:
        max_tokens: Most tokens of each request but the first ones.
    """

    max_tokens: int
    _requests: CompletionRequests

    async def start(self, kind: str, streams: int, prompt_len: int, max_tokens: int = 1, text: bool = False) -> None:
        """Open the connections and send the first requests; `kind` is generate."""
        assert kind == "generate", kind
        self.is_running = True
        self.max_tokens = max_tokens
        self._requests = CompletionRequests(prompt_len, text=text)
        rng = random.Random(streams)
        for place in range(streams):
            made = _Connection(self, place, rng.randint(1, max_tokens))
            await asyncio.get_running_loop().create_connection(lambda made=made: made, *split_address(self.address))  # type: ignore[misc]
            self.connections.append(made)

    def next_request(self, max_tokens: int, *, stamps: bool) -> bytes:
        """One whole HTTP request."""
        return self._requests.make(self.next_number(), max_tokens, stamps=stamps)

    def count_error(self) -> None:
        """A connection ended, by itself or because the load is taken away."""
        if self.is_running:
            self.tally.counts["errors"] += 1
