"""Runs loads on one form of one system and sums up."""

from __future__ import annotations

import asyncio
import statistics
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from bench.load.driver import Driver
from bench.load.records import RequestError, RequestRecord
from bench.load.run import Step, run_step
from bench.load.target import Target
from bench.load.vocabulary import Vocabulary
from bench.load.workload import Conversation, Load, conversations
from bench.peers.environments import PeerError
from bench.peers.serving import Resources
from bench.peers.systems import Form, Served, Setup, System
from bench.peers.workloads import Workload

# Tokens of the longest answer of a warm-up with few requests, and of the shortest one.
_WARM_UP_OUTPUT, _FEWEST = 8, 2
# A server may compile on its first requests.
_WARM_UP_S = 600.0
_OTHERS_CORES = 0.2
_DECODE_MESSAGES = 16


@dataclass(frozen=True, slots=True)
class Measurement:
    """One load on one form of one system; medians over its rounds.

    Attributes:
        system: Name of the system.
        form: Form of the weights.
        bits: Bits of the form.
        is_ours: True if it is ScaleLLM.
        workload: Name of the load.
        rates: Output tokens per second, of each round.
        ttft_p50_s: Seconds to the first token, and
        ttft_p99_s: for the slowest.
        decode_rate: Tokens per second of one stream after its first message, the median of the requests; 0 where
            answers were too short to tell.
        peak_mb: Resident memory of all processes at the most, in 10^6 bytes.
        prompts: Digest of what was sent, one per round.
        input_tokens: As the server counted them, all rounds together, and
        output_tokens: tokens generated.
        notes: Facts needed to read the figures.
        command: Command that started the server.
        environment: Added for it.
    """

    system: str
    form: str
    bits: int
    is_ours: bool
    workload: str
    rates: tuple[float, ...]
    ttft_p50_s: float
    ttft_p99_s: float
    decode_rate: float
    peak_mb: float
    prompts: tuple[str, ...]
    input_tokens: int
    output_tokens: int
    notes: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Output tokens per second, the median of the rounds."""
        return statistics.median(self.rates)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "rate": self.rate}


@dataclass(frozen=True, slots=True)
class Plan:
    """The number and length of measurements.

    Attributes:
        rounds: Times that each load is run, each with prompts of its own.
        limit_s: Seconds that one request may take.
        seed: Seed of all prompts.
        vocabulary: Words of the prompts.
    """

    rounds: int
    limit_s: float
    seed: int
    vocabulary: Vocabulary


@dataclass(frozen=True, slots=True)
class Round:
    """One round of a load.

    Attributes:
        step: The results.
        peak_bytes: Resident memory of the system's processes at the most.
        others_cores: Cores that somebody else kept busy meanwhile.
        setup: Setup of the server.
    """

    step: Step
    peak_bytes: int
    others_cores: float
    setup: Setup


def measure_round(
    system: System,
    form: Form,
    loads: Iterable[Workload],
    number: int,
    plan: Plan,
    folder: Path,
    on_measured: Callable[[Workload, Round], None],
    is_wanted: Callable[[Workload], bool] = lambda load: True,
) -> None:
    """Run each load once, with one server for all that want the same. Raises PeerError when a server does not start.

    A load whose requests fail is handed over with what came. Before each load `is_wanted` is asked: what the loads
    before it have shown may be enough. `number` is that of the round; prompts follow from it.
    """
    waiting = [(system.setup(form, load.need), load) for load in loads]
    while waiting:
        setup = waiting[0][0]
        together = [load for other, load in waiting if other == setup]
        waiting = [(other, load) for other, load in waiting if other != setup]
        with system.serve(setup, folder) as served:
            for load in filter(is_wanted, together):
                on_measured(load, _measure(served, setup, load, number, plan))


def _measure(served: Served, setup: Setup, load: Workload, number: int, plan: Plan) -> Round:
    with Resources(lambda: served.pids) as resources:
        try:
            step = asyncio.run(_step(served.make_target, load, number, plan))
        except RequestError as error:
            raise PeerError(f"{load.name}: {error.kind}: {error}") from None
    return Round(step, int(resources.peak_bytes), resources.others_cores, setup)


async def _step(make_target: Callable[[], Target], load: Workload, number: int, plan: Plan) -> Step:
    target = make_target()
    # Another one each time: servers keep sessions for a while.
    prefix = f"peers-{uuid.uuid4().hex[:8]}"
    alphabet = plan.vocabulary.alphabet
    try:
        await target.info()
        patient = Driver(target, plan.vocabulary, session_prefix=f"{prefix}-warm-up", deadline_s=_WARM_UP_S)
        planned = warm_up(load, alphabet, f"{plan.seed}/warm-up")
        warm = await patient.run(planned, Load(load.concurrency), "warm-up")
        failed = next((record for record in warm.records if record.status != "ok"), None)
        if failed is not None:
            raise RequestError(failed.kind, f"the warm-up failed: {failed.message}")
        driver = Driver(target, plan.vocabulary, session_prefix=prefix, deadline_s=plan.limit_s)
        return await run_step(
            driver,
            load.shape,
            Load(load.concurrency),
            alphabet=alphabet,
            num_requests=load.num_requests,
            seed=f"{plan.seed}/{load.name}/{number}",
        )
    finally:
        await target.close()


def warm_up(load: Workload, alphabet: Sequence[int], seed: str) -> list[Conversation]:
    """Return the requests sent before a load: as many as it has at once, whose answers end one after the other.

    So batches of all sizes occur: systems compile, record or choose something for each when it first does.
    """
    streams = load.concurrency
    shape = replace(load.shape, prefix_len=load.shape.input_len, turns=1)
    longest = min(load.shape.output_len, max(streams, _WARM_UP_OUTPUT))
    return [
        replace(planned, turns=(replace(planned.turns[0], output_len=max(_FEWEST, longest - place)),))
        for place, planned in enumerate(conversations(shape, alphabet, streams, seed))
    ]


def summarise(system: System, form: Form, load: Workload, rounds: Sequence[Round]) -> Measurement:
    """Medians over the rounds, and what is odd about them."""
    steps = [entry.step for entry in rounds]

    def median(name: str, key: str) -> float:
        spreads = [step.figures[name] for step in steps]
        found = [spread[key] for spread in spreads if spread is not None]
        return statistics.median(found) if found else float("nan")

    notes = [warning for step in steps for warning in step.warnings()]
    for step in steps:
        figures = step.figures
        if figures["output_tokens"] != figures["planned_output_tokens"]:
            notes.append(f"{figures['output_tokens']} tokens came, {figures['planned_output_tokens']} were asked for")
    others_cores = max(entry.others_cores for entry in rounds)
    if others_cores > _OTHERS_CORES:
        notes.append(f"others kept {others_cores:.1f} of the machine's cores busy: the figures are worth little")
    return Measurement(
        system=system.name,
        form=form.name,
        bits=form.bits,
        is_ours=system.is_ours,
        workload=load.name,
        rates=tuple(step.figures["output_throughput"] for step in steps),
        ttft_p50_s=1e-3 * median("ttft_ms", "p50"),
        ttft_p99_s=1e-3 * median("ttft_ms", "p99"),
        decode_rate=decode_rate([record for step in steps for record in step.records]),
        peak_mb=1e-6 * max(entry.peak_bytes for entry in rounds),
        prompts=tuple(step.prompts for step in steps),
        input_tokens=sum(step.figures["input_tokens"] for step in steps),
        output_tokens=sum(step.figures["output_tokens"] for step in steps),
        notes=tuple(dict.fromkeys(notes)),
        command=rounds[-1].setup.command,
        environment=dict(rounds[-1].setup.environment),
    )


def decode_rate(records: Iterable[RequestRecord]) -> float:
    """See Measurement. Only of answers that came in many messages: in few, tokens that waited for a busy client
    together look like tokens that were computed together.
    """
    long_enough = (r for r in records if r.status == "ok" and len(r.arrivals) >= _DECODE_MESSAGES)
    rates = [1 / record.tpot for record in long_enough if record.tpot]
    return statistics.median(rates) if rates else 0.0
