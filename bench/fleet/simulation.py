"""One simulated run: a fleet, what is sent to it, what breaks meanwhile, and what came of it."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import grpc

from bench.fleet.fleet import FleetError, FleetPlan, VirtualFleet
from bench.load.driver import Driver
from bench.load.figures import summarise
from bench.load.records import RequestRecord
from bench.load.text import step_text
from bench.load.vocabulary import Vocabulary
from bench.load.workload import Conversation, Load
from bench.virtual.loop import run_virtually


@dataclass(frozen=True)
class Faults:
    """Failures of a run, spread evenly over the requests; always the busiest executor.

    Attributes:
        kills: Executors that die.
        drains: Executors that leave in order.
        drain_limit: Seconds in which they finish what they have.
        back_after: Seconds until another one is there instead.
    """

    kills: int = 0
    drains: int = 0
    drain_limit: float = 1.0
    back_after: float = 5.0


@dataclass(frozen=True)
class Simulated:
    """Results of a run.

    Attributes:
        records: One per request, on virtual time.
        figures: See `summarise`.
        virtual_s: Seconds that passed.
        cpu_s: CPU seconds of this process, after the executors had joined.
        engines_cpu_s: Engines cpu s of these, in engines.
        num_steps: Steps of all engines that are there at the end.
        num_resubmitted: Requests that lost their executor and went on.
        num_pool_switches: Number of changes of the pool for new requests.
    """

    records: Sequence[RequestRecord]
    figures: dict[str, Any]
    virtual_s: float
    cpu_s: float
    engines_cpu_s: float
    num_steps: int
    num_resubmitted: int
    num_pool_switches: int

    @property
    def digest(self) -> str:
        """Names all times: equal for runs that went alike to the nanosecond."""
        hashed = hashlib.sha256()
        for record in self.records:
            times = [round(1e9 * moment) for moment in (record.sent, record.ended, *record.arrivals)]
            hashed.update(json.dumps([record.conversation, record.turn, record.counts, times]).encode())
        return hashed.hexdigest()[:16]

    def text(self, title: str) -> str:
        """For people."""
        num_requests = max(1, len(self.records))
        engines, others = 1e6 * self.engines_cpu_s, 1e6 * (self.cpu_s - self.engines_cpu_s)
        lines = [
            step_text(title, self.figures, []),
            f"virtual time {self.virtual_s:.2f} s, CPU time {self.cpu_s:.2f} s",
            f"CPU per request: engines {engines / num_requests:.0f} µs, "
            f"scheduler, links and edges {others / num_requests:.0f} µs; engines per step "
            f"{engines / max(1, self.num_steps):.0f} µs",
            f"requests that went on elsewhere: {self.num_resubmitted}",
            f"digest of all times: {self.digest}",
        ]
        return "\n".join(lines)


def simulate(
    plan: FleetPlan,
    planned: Sequence[Conversation],
    load: Load,
    *,
    seed: str = "0",
    times: Sequence[float] | None = None,
    faults: Faults = Faults(),
) -> Simulated:
    """Run a fleet until all requests have ended. All follows from the arguments.

    Args:
        plan: The fleet.
        planned: Requests to send.
        load: Times of sending.
        seed: For arrivals, and for what services draw.
        times: See `Driver.run`.
        faults: Faults to make.

    Raises FleetError for a token that is lost, comes twice or is wrong, for a request that failed without a cause, and
    for what is held after the end.
    """
    with _quiet():
        return run_virtually(_simulate(plan, planned, load, seed, times, faults), seed)


async def _simulate(
    plan: FleetPlan,
    planned: Sequence[Conversation],
    load: Load,
    seed: str,
    times: Sequence[float] | None,
    faults: Faults,
) -> Simulated:
    loop = asyncio.get_running_loop()
    fleet = VirtualFleet(plan)
    await fleet.join()
    driver = Driver(fleet, Vocabulary(()), clock=loop.time)
    breaking = _Breaking(fleet, faults, sum(len(conversation.turns) for conversation in planned))
    began, cpu = loop.time(), time.process_time()
    done = await driver.run(planned, load, seed, breaking.on_end, times)
    virtual_s, cpu_s = loop.time() - began, time.process_time() - cpu
    await breaking.end()
    await fleet.rest()
    for record in done.records:
        if record.status == "ok" and sum(record.counts) != record.output_len:
            raise FleetError(f"request {record.conversation}: {sum(record.counts)} tokens of {record.output_len}")
        if record.status == "failed" and record.kind != grpc.StatusCode.RESOURCE_EXHAUSTED.name:
            raise FleetError(f"request {record.conversation} ended with {record.kind}: {record.message}")
    engines = [executor.front.engine for executor in fleet.executors]
    return Simulated(
        done.records,
        summarise(done.records),
        virtual_s,
        cpu_s,
        sum(executor.cpu_s for executor in fleet.executors),
        sum(engine.engine.stats().steps for engine in engines),
        fleet.scheduler.placement.books.resubmitted,
        fleet.scheduler.fleet.pools.num_switches,
    )


class _Breaking:
    """Lets things break when so many requests have ended."""

    def __init__(self, fleet: VirtualFleet, faults: Faults, num_requests: int) -> None:
        self._fleet = fleet
        self._faults = faults
        turns = zip_longest(["kill"] * faults.kills, ["drain"] * faults.drains)
        kinds = [kind for turn in turns for kind in turn if kind is not None]
        self._due = {num_requests * (place + 1) // (len(kinds) + 1): kind for place, kind in enumerate(kinds)}
        self._num_ended = 0
        self._tasks: list[asyncio.Task[None]] = []

    def on_end(self, record: RequestRecord) -> None:
        self._num_ended += 1
        kind = self._due.get(self._num_ended)
        executor = self._fleet.busiest() if kind is not None else None
        if executor is None:
            return
        faults, fleet = self._faults, self._fleet
        job = (
            fleet.kill(executor, faults.back_after)
            if kind == "kill"
            else fleet.drain(executor, faults.drain_limit, faults.back_after)
        )
        self._tasks.append(asyncio.create_task(job))

    async def end(self) -> None:
        await asyncio.gather(*self._tasks)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the logs of a thousand executors."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(level)
