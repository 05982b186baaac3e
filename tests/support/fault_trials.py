"""A trial: streams run, a fault happens at a random moment, and each stream is compared with an undisturbed run."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass, field
from typing import Protocol

import grpc

from fault_injectors import Scene
from fault_promises import Fault
from fault_streams import Clients, Stream, differences
from fault_workload import Workload
from scalellm.v1 import generation_pb2
from service_processes import PATIENCE

OK, UNAVAILABLE = grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE
HEADINGS = (
    f"{'fault':34} {'injected':>8} {'in flight':>9} {'identical':>9} {'resumed':>7} {'errors':>6} {'longest pause':>13}"
)
_CODES = {
    "cancel": {OK, grpc.StatusCode.CANCELLED},
    "deadline": {OK, grpc.StatusCode.DEADLINE_EXCEEDED},
}
_BASELINES = 2
"""Undisturbed runs before the memory of a line counts as grown."""


@dataclass
class Tally:
    """A row of the table: what came of a fault, over all its trials."""

    name: str
    injected: int = 0
    in_flight: int = 0
    identical: int = 0
    resumed: int = 0
    errors: int = 0
    pause: float = 0.0

    def count(self, stream: Stream, since: float, *, is_identical: bool) -> None:
        """Count a stream under which the fault happened at the time `since`."""
        self.in_flight += 1
        self.errors += stream.code is UNAVAILABLE
        self.identical += stream.code is not UNAVAILABLE and is_identical
        self.resumed += stream.was_resumed
        self.pause = max(self.pause, stream.longest_pause(since))

    def __str__(self) -> str:
        counts = f"{self.injected:8} {self.in_flight:9} {self.identical:9} {self.resumed:7} {self.errors:6}"
        return f"{self.name:34} {counts} {self.pause:11.1f} s"


class BreakableLine(Protocol):
    """The parts of a line that a trial uses."""

    @property
    def addresses(self) -> list[str]:
        """Address for clients."""

    async def wait_linked(self) -> None:
        """Wait until all links are up."""

    async def rest(self, before: dict[str, object] | None = None) -> dict[str, object]:
        """Wait until nothing runs and all is as before; what that is. Raises AssertionError with what is not."""


@dataclass
class Trials:
    """All trials of one workload on one line.

    Attributes:
        undisturbed: The streams as they run without a fault.
        before: The line at rest.
    """

    line: BreakableLine
    workload: Workload
    undisturbed: list[Stream] = field(default_factory=list)
    before: dict[str, object] = field(default_factory=dict)
    _count: int = 0

    async def prepare(self) -> None:
        """Run the streams undisturbed."""
        if self.before:
            return
        for number in range(_BASELINES):
            streams = self.workload.streams(f"undisturbed-{number}", is_undisturbed=True)
            async with self._clients() as clients:
                await clients.first_turns(streams)
                await asyncio.gather(*clients.start(streams, random.Random(number)))
            assert {stream.code for stream in streams} == {OK}, [stream.details for stream in streams]
            if number == 0:
                self.workload.learn_stops(streams)
            self.undisturbed = streams
        self.before = await self.line.rest()

    async def run(self, fault: Fault, seconds: float, rng: random.Random, tally: Tally) -> None:
        """One fault. Raises AssertionError with everything that is not as it should be."""
        self._count += 1
        streams = self.workload.streams(f"disturbed-{self._count}")
        due = sum(stream.num_tokens for stream in self.undisturbed)
        async with self._clients() as clients:
            await clients.first_turns(streams)
            tasks = clients.start(streams, rng)
            goal = rng.uniform(0.02, 0.4) * due
            while sum(stream.num_tokens for stream in streams) < goal and not all(task.done() for task in tasks):
                await asyncio.sleep(0.01)
            struck_at = time.monotonic()
            in_flight = [stream for stream in streams if stream.has_begun and not stream.codes]
            # Both to their ends, whatever happens to the other one: a fault is always mended.
            done = await asyncio.gather(
                fault.inject(Scene(self.line, seconds, rng, streams)),
                asyncio.wait_for(asyncio.gather(*tasks), 5 * PATIENCE),
                return_exceptions=True,
            )
        for outcome in done:
            if isinstance(outcome, BaseException):
                raise outcome
        tally.injected += 1
        wrong = []
        for stream in streams:
            odd = self.differences(stream)
            wrong += [*odd, *unpromised(fault, stream)]
            if stream in in_flight:
                tally.count(stream, struck_at, is_identical=not odd)
        assert not wrong, "\n".join(wrong)
        await self.settle()

    async def run_one(self, rng: random.Random) -> Stream:
        """Any one of the streams, on connections of its own. Raises NoFirstTurnError."""
        self._count += 1
        stream = rng.choice(self.workload.streams(f"alone-{self._count}"))
        addresses = rng.sample(self.line.addresses, len(self.line.addresses))
        async with Clients(addresses, connections=2) as clients:
            await clients.first_turns([stream])
            await asyncio.gather(*clients.start([stream], rng, within=0.1))
        return stream

    async def settle(self) -> None:
        """Wait until all is as it was before."""
        await self.line.wait_linked()
        self.before = await self.line.rest(self.before)

    def differences(self, stream: Stream) -> list[str]:
        """Describe what a client saw of a stream that it would not have seen of the undisturbed one."""
        try:
            return differences(stream, self.undisturbed[stream.number])
        except AssertionError as error:  # tokens out of order: the other streams are looked at as well
            return [str(error)]

    def _clients(self) -> Clients:
        return Clients(self.line.addresses)


def unpromised(fault: Fault, stream: Stream) -> list[str]:
    """Describe what the client saw and should not have seen under this fault."""
    codes = _CODES.get(stream.kind, {OK}) | ({UNAVAILABLE} if fault.errors and not stream.is_resumable else set())
    if stream.code not in codes:
        return [f"stream {stream.number} ({stream.kind}) ended {stream.code}: {stream.details}"]
    if stream.kind == "session" and stream.finished is not None:
        saved = {generation_pb2.SESSION_OUTCOME_SAVED}
        if fault.unsaved:
            saved.add(generation_pb2.SESSION_OUTCOME_UNAVAILABLE)
        if stream.finished.session not in saved:
            return [f"stream {stream.number}: the session's outcome is {stream.finished.session}"]
    return []
