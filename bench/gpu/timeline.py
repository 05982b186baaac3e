"""The time of one replay, by kernel."""

from __future__ import annotations

from collections.abc import Sequence

from bench.gpu.device import Span

_MOST = 24


def kernels_of(spans: Sequence[Span]) -> list[str]:
    """Return a line for each kernel, the longest first: how often, its time, and the gaps of the device before it.

    `spans` are in the order of their begin. Kernels that overlap have no gap between them.
    """
    counts: dict[str, int] = {}
    times: dict[str, float] = {}
    gaps: dict[str, float] = {}
    busy_until = spans[0].start_us if spans else 0.0
    for span in spans:
        counts[span.name] = counts.get(span.name, 0) + 1
        times[span.name] = times.get(span.name, 0.0) + span.end_us - span.start_us
        gaps[span.name] = gaps.get(span.name, 0.0) + max(0.0, span.start_us - busy_until)
        busy_until = max(busy_until, span.end_us)
    order = sorted(times, key=lambda name: -times[name])
    lines = [f"{counts[n]:4} x {times[n]:9.1f} us, gaps {gaps[n]:7.1f} us  {n[:100]}" for n in order[:_MOST]]
    rest = order[_MOST:]
    if rest:
        count, time = sum(counts[n] for n in rest), sum(times[n] for n in rest)
        lines.append(f"{count:4} x {time:9.1f} us, gaps {sum(gaps[n] for n in rest):7.1f} us  of {len(rest)} others")
    total, idle = sum(times.values()), sum(gaps.values())
    return [f"{len(spans)} launches, {total:.1f} us in kernels, {idle:.1f} us in gaps", *lines]
