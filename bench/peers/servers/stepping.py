"""A process that steps an engine, so that requests join and leave its batch between two steps.

A process and not a thread: libraries keep Python's lock while they compute, and nobody would be answered meanwhile.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import multiprocessing
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Job:
    """A request to the engine."""

    number: int
    prompt: Sequence[int]
    max_tokens: int
    ignore_eos: bool


@dataclass(frozen=True, slots=True)
class Output:
    """New tokens of a job; `is_last` with or without any."""

    number: int
    token_ids: Sequence[int]
    is_last: bool


class Engine(Protocol):
    """An engine that is stepped."""

    def add(self, job: Job) -> None:
        """Take in a job."""

    def cancel(self, number: int) -> None:
        """Drop a job; unknown and ended ones are nothing to say about."""

    def has_work(self) -> bool:
        """True if a step would do anything."""

    def step(self) -> list[Output]:
        """Compute one step."""


class Stepping:
    """The engine's process, seen from an event loop.

    Args:
        make_engine: Called in the process; has to be importable there.
    """

    def __init__(self, make_engine: Callable[[], Engine]) -> None:
        self._loop = asyncio.get_running_loop()
        self._outbox: queue.SimpleQueue[dict[str, object] | None] = queue.SimpleQueue()
        self._streams: dict[int, asyncio.Queue[Output]] = {}
        self._numbers = itertools.count()
        self.ready: asyncio.Future[None] = self._loop.create_future()
        """Done when the engine is made."""
        self.ended: asyncio.Future[None] = self._loop.create_future()
        """Done when the process is at its end."""
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        process = context.Process(target=run_engine, args=(theirs, make_engine), daemon=True)
        process.start()
        theirs.close()
        for work in (self._send, self._receive):
            threading.Thread(target=work, daemon=True).start()

    async def generate(self, prompt: Sequence[int], max_tokens: int, ignore_eos: bool) -> AsyncGenerator[Sequence[int]]:
        """New tokens, step by step. Closing the generator early cancels the job."""
        number = next(self._numbers)
        stream = self._streams[number] = asyncio.Queue()
        self._outbox.put(asdict(Job(number, prompt, max_tokens, ignore_eos)))
        is_over = False
        try:
            while not is_over:
                output = await stream.get()
                is_over = output.is_last
                if output.token_ids:
                    yield output.token_ids
        finally:
            del self._streams[number]
            if not is_over:
                self._outbox.put({"cancel": number})

    def close(self) -> None:
        """End the process after its step."""
        self._outbox.put(None)

    def _send(self) -> None:
        # A thread: the engine reads between steps only, and a full pipe must not hold up the event loop.
        while (command := self._outbox.get()) is not None:
            try:
                self._connection.send_bytes(json.dumps(command).encode())
            except OSError:
                return
        self._connection.send_bytes(b"null")

    def _receive(self) -> None:
        try:
            self._connection.recv_bytes()
            self._loop.call_soon_threadsafe(self.ready.set_result, None)
            while True:
                outputs = [Output(*values) for values in json.loads(self._connection.recv_bytes())]
                # Once per step: waking the event loop for each token would take the engine's time.
                self._loop.call_soon_threadsafe(self._deliver, outputs)
        except (EOFError, OSError):
            self._loop.call_soon_threadsafe(self._end)

    def _end(self) -> None:
        for future in (self.ready, self.ended):
            if not future.done():
                future.set_result(None)

    def _deliver(self, outputs: Sequence[Output]) -> None:
        for output in outputs:
            if output.number in self._streams:
                self._streams[output.number].put_nowait(output)


def run_engine(connection: Connection, make_engine: Callable[[], Engine]) -> None:
    """The process: until the other side is gone, or says so."""
    engine = make_engine()
    connection.send_bytes(b"ready")
    while True:
        while not engine.has_work() or connection.poll():
            try:
                command = json.loads(connection.recv_bytes())
            except EOFError:
                return
            if command is None:
                return
            if "cancel" in command:
                engine.cancel(command["cancel"])
            else:
                engine.add(Job(**command))
        outputs = [(output.number, list(output.token_ids), output.is_last) for output in engine.step()]
        if outputs:
            connection.send_bytes(json.dumps(outputs).encode())
