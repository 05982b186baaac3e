"""Few replicas with many devices against many with few, and the scheduler's policies that choose between them.

Eight modelled A100s on PCIe run an 8B model as eight replicas or as one; the step-time lines are those of a computed
roofline with the all-reduces of tensor parallelism. Where both layouts are there, each has devices of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from bench.fleet.fleet import VOCABULARY, FleetPlan, Pool
from bench.fleet.simulation import simulate
from bench.load.vocabulary import Vocabulary
from bench.load.workload import Load, Shape, conversations
from scalellm.services.executor.engine.step_time import StepTimeModel

_PROMPT_LEN, _OUTPUT_LEN = 64, 48
_ROUNDS, _LEAST = 4, 24
MOST_CLIENTS = 1024


def _pool(size: int, tensor_parallel: int, base: float, per_row: float) -> Pool:
    return Pool(
        size,
        tensor_parallel,
        steps=StepTimeModel(base, per_prefill_token=88e-6, per_decode=per_row, per_context_token=0.0),
        max_num_seqs=MOST_CLIENTS,
        max_num_batched_tokens=2048,
        max_model_len=1024,
        num_blocks=4096,
        measures=True,
    )


_SMALL, _LARGE = _pool(8, 1, 11.1e-3, 68e-6), _pool(1, 8, 4.25e-3, 85e-6)

LAYOUTS = {
    "8xTP1": FleetPlan((_SMALL,)),
    "1xTP8": FleetPlan((_LARGE,)),
    "both, fixed": FleetPlan((_SMALL, _LARGE), settings={"pool_policy": "fixed"}),
    "both, measured": FleetPlan((_SMALL, _LARGE), settings={"pool_policy": "measured"}),
}


@dataclass(frozen=True)
class Point:
    """One number of clients: mean latency in milliseconds of each layout, and how often policies switched."""

    clients: int
    latency_ms: dict[str, float]
    switches: dict[str, int]

    @property
    def excess(self) -> float:
        """The share by which the measured policy is slower than the better static layout."""
        return self.latency_ms["both, measured"] / min(self.latency_ms["8xTP1"], self.latency_ms["1xTP8"]) - 1

    def row(self) -> str:
        """Return a row of a table in Markdown."""
        figures = " | ".join(f"{value:.0f}" for value in self.latency_ms.values())
        return f"| {self.clients} | {figures} | {self.excess:+.1%} | {max(self.switches.values())} |"


def header() -> str:
    """The table's head."""
    names = [*LAYOUTS, "measured to the better one", "switches at most"]
    return f"| clients | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}"


def sweep(clients: Sequence[int]) -> list[Point]:
    """Run each layout under a closed loop of each number of clients; the first request of a client does not count."""
    return [_point(count) for count in clients]


def _point(clients: int) -> Point:
    alphabet = Vocabulary.of_size(VOCABULARY).alphabet
    shape = Shape(input_len=_PROMPT_LEN, output_len=_OUTPUT_LEN)
    planned = conversations(shape, alphabet, max(_ROUNDS * clients, _LEAST), f"sweep {clients}")
    latency_ms, switches = {}, {}
    for name, plan in LAYOUTS.items():
        done = simulate(plan, planned, Load(concurrency=clients))
        latency_ms[name] = 1e3 * fmean(record.e2e for record in done.records[clients:])
        switches[name] = done.num_pool_switches
    return Point(clients, latency_ms, switches)
