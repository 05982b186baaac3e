"""Measurement of the best number of threads for the engine's matrix products on this CPU."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence

import torch

_ROUNDS = 12
_LIMIT = 0.5
"""Seconds after which no round follows, once there were two: with a large model a round takes half a second."""
_PRODUCTS = 8  # of a round, timed together


def choose_num_threads(
    product: Callable[[torch.Tensor], object],
    hidden_size: int,
    dtype: torch.dtype,
    *,
    cores: int | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> int:
    """Return the fastest number of threads for a product `[T, hidden_size]` of the model; takes less than a second for
    small models.

    Two threads are not always faster than one: sleeping ones must be woken, and the other services keep cores busy. So
    the counts are measured, on one row (a lone decode) and on 64 (a batch), with the weights in the form they have.
    They are measured in turns and the best time of each counts, because on a fast machine another process that runs
    for some milliseconds would otherwise spoil all measurements of one count.

    Args:
        product: Computes a product of the model, with torch's number of threads.
        hidden_size: Columns of the product's input.
        dtype: Type of the product's input.
        cores: Processors that this process may use; None: ask the system.
        clock: Returns seconds.
    """
    cores = cores or len(os.sched_getaffinity(0))
    candidates = sorted({1, max(1, cores // 2), cores})
    rows = [torch.ones(count, hidden_size, dtype=dtype) for count in (1, 64)]
    best = {count: [float("inf")] * len(rows) for count in candidates}
    until = clock() + _LIMIT
    for done in range(_ROUNDS):
        if done >= 2 and clock() > until:
            break
        for count in candidates:
            times = _round(count, rows, product, clock)
            best[count] = [min(pair) for pair in zip(best[count], times, strict=True)]
    # The product of both times: so the two shapes have the same weight.
    return min(candidates, key=lambda count: best[count][0] * best[count][1])


def _round(
    num_threads: int,
    rows: Sequence[torch.Tensor],
    product: Callable[[torch.Tensor], object],
    clock: Callable[[], float],
) -> list[float]:
    """Return the seconds that the products of each shape take."""
    torch.set_num_threads(num_threads)
    times = []
    for row in rows:
        product(row)  # wakes or starts the threads
        started = clock()
        for _ in range(_PRODUCTS):
            product(row)
        times.append(clock() - started)
    return times
