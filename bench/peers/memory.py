"""Bandwidth of this machine's memory."""

from __future__ import annotations

import time

import torch

_NUMBERS = 2**28
_READS = 8


def read_bandwidth(threads: int) -> float:
    """Return the 10^9 bytes per second at which so many threads add up a vector of 1 GiB, the best of some times.

    It bounds the decode of one sequence, which reads all weights for each token. The product of a matrix and a vector
    reads a third slower on some CPUs.
    """
    numbers = torch.zeros(_NUMBERS)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        seconds = min(_seconds_of_sum(numbers) for _ in range(_READS))
    finally:
        torch.set_num_threads(before)
    return numbers.nbytes / 1e9 / seconds


def _seconds_of_sum(numbers: torch.Tensor) -> float:
    began = time.perf_counter()
    numbers.sum()
    return time.perf_counter() - began
