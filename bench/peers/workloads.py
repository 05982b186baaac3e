"""The loads that all systems get."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.load.workload import Shape
from bench.peers.systems import Need

# What a chat template adds to a turn and, once, to a session, as a bound.
_TEMPLATE_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Workload:
    """A closed loop.

    Attributes:
        name: `1`, `8`, `64` for the fixed lengths at so many at once; `shared`; `sessions`.
        shape: Lengths.
        concurrency: Requests, or sessions, at once.
        num_requests: Number of requests of each round.
    """

    name: str
    shape: Shape
    concurrency: int
    num_requests: int

    @property
    def is_prefix(self) -> bool:
        """True if the workload is about prompts whose computed beginnings can be used again."""
        return self.shape.workload != "fixed"

    @property
    def need(self) -> Need:
        """A server's room for this load."""
        shape = self.shape
        turns = shape.turns if shape.workload == "sessions" else 1
        prefix = shape.prefix_len if shape.workload == "shared" else 0
        template = _TEMPLATE_TOKENS * (turns + 1) if shape.workload == "sessions" else 0
        return Need(self.concurrency, prefix + turns * (shape.input_len + shape.output_len) + template)


def workloads(
    names: Sequence[str], concurrency: Sequence[int], input_len: int, output_len: int, *, quick: bool
) -> list[Workload]:
    """The chosen ones of `fixed`, `shared` and `sessions`; ValueError for other names. Quick: a test, no figures."""
    unknown = set(names) - {"fixed", "shared", "sessions"}
    if unknown:
        raise ValueError(f"--workloads: {', '.join(sorted(unknown))}: known are fixed, shared, sessions")
    chosen = []
    if "fixed" in names:
        shape = Shape("fixed", input_len, output_len)
        chosen += [Workload(str(level), shape, level, _count(level, quick=quick)) for level in concurrency]
    # Short messages behind a long common part: what a prefix cache is for.
    part = (8, 8) if quick else (64, 64)
    if "shared" in names:
        shape = Shape("shared", *part, prefix_len=128 if quick else 1024)
        chosen.append(Workload("shared", shape, 8 if quick else 64, 16 if quick else 128))
    if "sessions" in names:
        shape = Shape("sessions", *part, turns=2 if quick else 8)
        chosen.append(Workload("sessions", shape, 2 if quick else 8, 4 if quick else 64))
    return chosen


def _count(level: int, *, quick: bool) -> int:
    """One wave of many; several of few, whose ends would weigh too much."""
    return level if quick else max(level, min(3 * level, 16))
