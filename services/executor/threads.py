"""Measurement of the best number of threads for the engine's matrix products on this CPU."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import torch

_ROUNDS = 5


def choose_num_threads(product: Callable[[torch.Tensor], object], hidden_size: int, dtype: torch.dtype) -> int:
    """Return the fastest number of threads for a product `[T, hidden_size]` of the model; takes well under a second.

    Two threads are not always faster than one: sleeping ones must be woken, and the other services keep cores busy. So
    the counts are measured, on one row (a lone decode) and on 64 (a batch), with the weights in the form they have.
    """
    cores = len(os.sched_getaffinity(0))
    candidates = sorted({1, max(1, cores // 2), cores})
    rows = [torch.ones(count, hidden_size, dtype=dtype) for count in (1, 64)]
    return min(candidates, key=lambda count: _score(count, rows, product))


def _score(num_threads: int, rows: list[torch.Tensor], product: Callable[[torch.Tensor], object]) -> float:
    """Return the product of the best times of both shapes, so that they have the same weight."""
    torch.set_num_threads(num_threads)
    score = 1.0
    for row in rows:
        product(row)
        best = float("inf")
        for _ in range(_ROUNDS):
            started = time.perf_counter()
            for _ in range(8):
                product(row)
            best = min(best, time.perf_counter() - started)
        score *= best
    return score
