"""The simulator against the real line: the same requests to both, and how far their times lie apart.

The line has the fake engine, whose steps take what a model of a GPU says. What that model does not know is measured
with one stream, where nothing waits for anything: the time that a tokenizer worker needs for each of several requests
that come at once, how long a message takes from one service to the next, and what a step takes beyond its model. With
these figures the other loads are simulated, and compared.

Compared are means, because in a closed loop they follow from the throughput. Medians depend on the phase in which
requests of one length follow each other: in simulations of 16 at once, messages of 1.5 to 4.3 ms gave medians of TTFT
from 153 to 260 ms, and means from 208 to 223. Several rounds are run, and the middle one counts, because other
processes disturb some of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median

from bench.fleet.fleet import VOCABULARY, FleetPlan, Pool
from bench.fleet.simulation import simulate
from bench.load.driver import Driver
from bench.load.grpc_target import GrpcTarget
from bench.load.records import RequestRecord
from bench.load.vocabulary import Vocabulary
from bench.load.workload import Conversation, Load, Shape, conversations
from bench.services.processes import Service, Workplace
from scalellm.services.executor.engine.fake_model_runner import STEP_TIME_PRESETS

PRESET = "h200-llama-8b"
LIMIT = 0.10
"""Largest allowed error of the simulation's TTFT and ITL, as a share of the line's."""

_ENCODED = 128
"""Requests by which a worker's time for one is measured."""

_HOPS = 4
"""Messages that the simulator has before a first token: from the edge to the scheduler, to the executor, and back."""


@dataclass(frozen=True)
class Comparison:
    """One load: milliseconds of the real line and of the simulation, means of the middle round."""

    load: str
    real_ttft: float
    ttft: float
    real_itl: float
    itl: float

    @property
    def is_close(self) -> bool:
        """True if both are within the limit."""
        pairs = ((self.ttft, self.real_ttft), (self.itl, self.real_itl))
        return all(abs(simulated - real) <= LIMIT * real for simulated, real in pairs)

    def text(self) -> str:
        """For people."""
        ttft, itl = self.ttft / self.real_ttft - 1, self.itl / self.real_itl - 1
        verdict = "within" if self.is_close else "NOT within"
        return (
            f"{self.load:>6}: TTFT {self.real_ttft:.2f} ms, simulated {self.ttft:.2f} ({ttft:+.1%}); "
            f"ITL {self.real_itl:.3f} ms, simulated {self.itl:.3f} ({itl:+.1%}): {verdict} {LIMIT:.0%}"
        )


def calibrate(
    model: Path, loads: Sequence[int], shape: Shape, num_executors: int, num_rounds: int
) -> tuple[FleetPlan, list[Comparison]]:
    """Record a line of real processes, fit the simulator with one stream, and compare both at the other loads.

    Args:
        model: A model's folder, for its tokenizer.
        loads: Requests in flight, one run each.
        shape: Shape of the requests.
        num_executors: Number of executors of the line, and of the fleet.
        num_rounds: Number of times that all loads are run, with other prompts each time.

    Returns:
        The fleet's plan, and one comparison per load, that of one stream first.
    """
    pool = Pool(num_executors)
    planned = {load: [_planned(load, shape, number) for number in range(num_rounds)] for load in (1, *loads)}
    recorded: dict[int, list[Sequence[RequestRecord]]] = {load: [] for load in planned}
    with _line(model, pool) as tokenizer:
        encoding = _encoding(tokenizer, shape)
        for number in range(num_rounds):
            for load, rounds in planned.items():
                recorded[load].append(asyncio.run(_record(tokenizer.address, rounds[number], load)))
    plan = _fit(FleetPlan((pool,), num_edges=1, encoding=encoding), planned[1], recorded[1])
    return plan, [_compare(plan, rounds, load, recorded[load]) for load, rounds in planned.items()]


def _planned(load: int, shape: Shape, number: int) -> list[Conversation]:
    return _prompts(shape, max(16, 4 * load), f"{load}/{number}")


def _prompts(shape: Shape, count: int, name: str) -> list[Conversation]:
    return conversations(shape, Vocabulary.of_size(VOCABULARY).alphabet, count, f"calibrate/{name}")


def _encoding(tokenizer: Service, shape: Shape) -> float:
    """Seconds that a worker needs to pass on a request: requests that come at once leave it so far apart.

    They are half of the CPU time of its busiest thread for a request with an answer of one token, for which it passes
    on one message in each direction.
    """
    wanted = _prompts(replace(shape, output_len=1), _ENCODED, "encoding")
    asyncio.run(_record(tokenizer.address, wanted[: _ENCODED // 4], 1))  # caches and connections
    (worker,) = tokenizer.processes["worker"]
    before = {thread.id: thread.user_time + thread.system_time for thread in worker.threads()}
    asyncio.run(_record(tokenizer.address, wanted, 1))
    spent = (thread.user_time + thread.system_time - before.get(thread.id, 0.0) for thread in worker.threads())
    return max(spent) / _ENCODED / 2


@contextmanager
def _line(model: Path, pool: Pool) -> Iterator[Service]:
    limits = ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "num_blocks", "block_size")
    flags = [part for name in limits for part in (f"--{name.replace('_', '-')}", str(getattr(pool, name)))]
    flags += ["--model", str(model), "--engine", "fake", "--fake-preset", PRESET]
    with Workplace() as place:
        executors = [place.service("executor", *flags).address for _ in range(pool.size)]
        scheduler = place.service("scheduler", "--executors", ",".join(executors))
        yield place.service("tokenizer", "--scheduler", scheduler.address, "--model", str(model), "--workers", "1")


async def _record(address: str, planned: Sequence[Conversation], load: int) -> list[RequestRecord]:
    target = GrpcTarget(address)
    try:
        driver = Driver(target, Vocabulary(()))
        warm_up = conversations(Shape(input_len=16, output_len=8), range(300, 400), 4, f"warm-up {load}")
        await driver.run(warm_up, Load(concurrency=1), "warm-up")
        return (await driver.run(planned, Load(concurrency=load), str(load))).records
    finally:
        await target.close()


def _times(rounds: Iterable[Sequence[RequestRecord]]) -> tuple[float, float]:
    """Milliseconds: TTFT, and TPOT, which also means something where tokens came two in a message."""
    ttfts, tpots = [], []
    for records in rounds:
        done = [record for record in records if record.status == "ok"]
        ttfts.append(mean(record.ttft for record in done if record.ttft is not None))
        tpots.append(mean(record.tpot for record in done if record.tpot is not None))
    return 1e3 * median(ttfts), 1e3 * median(tpots)


def _simulated(plan: FleetPlan, planned: Sequence[Sequence[Conversation]], load: int) -> tuple[float, float]:
    return _times(simulate(plan, wanted, Load(concurrency=load)).records for wanted in planned)


def _fit(
    plan: FleetPlan, planned: Sequence[Sequence[Conversation]], recorded: Sequence[Sequence[RequestRecord]]
) -> FleetPlan:
    """Lay the differences at one stream to messages and to steps."""
    ttft, itl = _simulated(replace(plan, latency=0.0), planned, 1)
    real_ttft, real_itl = _times(recorded)
    per_step = max(0.0, real_itl - itl) / 1e3
    latency = max(0.0, real_ttft - ttft - 1e3 * per_step) / 1e3 / _HOPS
    steps = STEP_TIME_PRESETS[PRESET]
    pool = replace(plan.pools[0], steps=replace(steps, base=steps.base + per_step))
    return replace(plan, pools=(pool,), latency=latency)


def _compare(
    plan: FleetPlan,
    planned: Sequence[Sequence[Conversation]],
    load: int,
    recorded: Sequence[Sequence[RequestRecord]],
) -> Comparison:
    real_ttft, real_itl = _times(recorded)
    ttft, itl = _simulated(plan, planned, load)
    return Comparison(str(load), real_ttft, ttft, real_itl, itl)
