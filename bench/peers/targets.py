"""The targets, and the check if they are reached."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench.peers.measure import Measurement

_OVER_VLLM = 4.3
_SHARE = 1.5
_PREFIX_SHARE = 2.0


@dataclass(frozen=True, slots=True)
class Target:
    """One line of what must be reached.

    Attributes:
        name: Name of the comparison.
        ours: Our figure and its form.
        best: The best peer's, with its name and form.
        ratio: Ours over the best peer's.
        limit: The ratio that must be reached; for times, the one that must not be passed.
        is_time: True if less is better.
    """

    name: str
    ours: str
    best: str
    ratio: float
    limit: float
    is_time: bool = False

    @property
    def is_reached(self) -> bool:
        """True if the figure meets its target."""
        return self.ratio <= self.limit if self.is_time else self.ratio >= self.limit

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "is_reached": self.is_reached}


def targets(measurements: Sequence[Measurement]) -> list[Target]:
    """All lines whose two sides were measured.

    Ours is the form with the highest rate under that load, for its times as well. The best peer is the best of all
    peers and forms, by each figure for itself.
    """
    found = [_rate(f"{load} at once, tok/s", _under(measurements, load), _SHARE) for load in ("64", "8")]
    for bits in sorted({entry.bits for entry in measurements if entry.is_ours}):
        alike = [entry for entry in _under(measurements, "1") if entry.bits == bits and entry.decode_rate > 0]
        name = f"1 stream, decode tok/s, {bits} bits"
        found.append(_compare(name, alike, lambda entry: entry.decode_rate, "tok/s", 1.0))
    for load in ("64", "8"):
        under = _under(measurements, load)
        found.append(_time(f"{load} at once, TTFT p50", under, lambda entry: entry.ttft_p50_s))
        found.append(_time(f"{load} at once, TTFT p99", under, lambda entry: entry.ttft_p99_s))
    found += [_rate(f"{load}, tok/s", _under(measurements, load), _PREFIX_SHARE) for load in ("shared", "sessions")]
    vllm = [entry for entry in _under(measurements, "64") if entry.is_ours or entry.system == "vllm"]
    found.append(_rate("64 at once, tok/s, against vLLM", vllm, _OVER_VLLM))
    return [target for target in found if target is not None]


def _under(measurements: Iterable[Measurement], load: str) -> list[Measurement]:
    return [entry for entry in measurements if entry.workload == load and entry.rate > 0]


def _rate(name: str, entries: Sequence[Measurement], limit: float) -> Target | None:
    return _compare(name, entries, lambda entry: entry.rate, "tok/s", limit)


def _time(name: str, entries: Sequence[Measurement], read: Callable[[Measurement], float]) -> Target | None:
    return _compare(name, entries, read, "s", 1.0, is_time=True)


def _compare(
    name: str,
    entries: Sequence[Measurement],
    read: Callable[[Measurement], float],
    unit: str,
    limit: float,
    *,
    is_time: bool = False,
) -> Target | None:
    ours = [entry for entry in entries if entry.is_ours]
    peers = [entry for entry in entries if not entry.is_ours]
    if not ours or not peers:
        return None
    mine = max(ours, key=lambda entry: entry.rate)
    best = (min if is_time else max)(peers, key=read)

    def text(entry: Measurement) -> str:
        return f"{read(entry):.2f} {unit} ({entry.system} {entry.form})"

    return Target(name, text(mine), text(best), read(mine) / read(best), limit, is_time)
