"""How many threads the engine's matrix products should use on this CPU, found by trying."""

from __future__ import annotations

import os
import time

import torch

_ROUNDS = 5


def choose_num_threads(hidden_size: int, intermediate_size: int, dtype: torch.dtype) -> int:
    """Return the fastest number of threads for this model's shapes; takes well under a second.

    Two threads are not always faster than one: sleeping OpenMP threads must be woken for every product, and the other
    services keep cores busy. So the counts are measured, on a product of one row (a lone decode) and of 64 (a batch).
    """
    cores = len(os.sched_getaffinity(0))
    candidates = sorted({1, max(1, cores // 2), cores})
    weight = torch.ones(intermediate_size, hidden_size, dtype=dtype)
    rows = [torch.ones(count, hidden_size, dtype=dtype) for count in (1, 64)]
    return min(candidates, key=lambda count: _score(count, rows, weight))


def _score(num_threads: int, rows: list[torch.Tensor], weight: torch.Tensor) -> float:
    """Product of the best times, so that both shapes weigh the same."""
    torch.set_num_threads(num_threads)
    score = 1.0
    for row in rows:
        torch.nn.functional.linear(row, weight)
        best = float("inf")
        for _ in range(_ROUNDS):
            started = time.perf_counter()
            for _ in range(8):
                torch.nn.functional.linear(row, weight)
            best = min(best, time.perf_counter() - started)
        score *= best
    return score
