"""Time of an op: alone in a graph, and among many of its kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.gpu.device import Call, Device

_GRAPH_US = 4000.0  # a graph of copies lasts about so long: events are far more exact than that
_MOST_COPIES = 256
_MOST_SETS = 32


@dataclass(frozen=True, slots=True)
class Timing:
    """Microseconds of one call.

    `us` is without gaps: the graph of many calls, over their number. `replay_us` is the replay of a graph that holds
    one call, its inputs not in the second-level cache: what the op costs on its own. `cold` says whether the inputs of
    the many were too large together to come from that cache.
    """

    us: float
    replay_us: float
    cold: bool


def num_sets(device: Device, num_bytes: int, *, most: int = _MOST_SETS) -> int:
    """Return how many sets of inputs of this size an op is to go round, so that it does not find the last one cached.

    An op that moves little would need thousands; in a model, too, its inputs have just been written, so it gets
    as many as a model has layers.
    """
    wanted = -(-3 * device.l2_bytes // max(1, num_bytes))
    room = max(1, device.free_bytes() // 3 // max(1, num_bytes))
    return max(1, min(wanted, most, room))


def time_op(device: Device, calls: Sequence[Call], num_bytes: int) -> Timing:
    """Time equal calls on different inputs, each of which moves `num_bytes`."""
    for call in calls:
        call()
    device.synchronize()
    replay_us = device.time(device.capture(calls[0]), flush=True)
    copies = max(1, min(_MOST_COPIES, round(_GRAPH_US / replay_us)) if not device.dry_run else 1)
    copies = -(-copies // len(calls)) * len(calls)

    def many() -> None:
        for i in range(copies):
            calls[i % len(calls)]()

    us = device.time(device.capture(many), flush=True, repeats=9) / copies
    return Timing(us, replay_us, cold=len(calls) * num_bytes > 2 * device.l2_bytes)
