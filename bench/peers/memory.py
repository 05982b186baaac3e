"""Bandwidth of this machine's memory."""

from __future__ import annotations

import time

import torch

_ROWS = 2**14
_READS = 8


def read_bandwidth(threads: int) -> float:
    """Return the 10^9 bytes per second at which so many threads read a matrix of 1 GiB, the best of some times.

    It bounds the decode of one sequence, which reads all weights for each token.
    """
    matrix, vector = torch.zeros(_ROWS, _ROWS), torch.zeros(_ROWS)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        seconds = min(_seconds_of_product(matrix, vector) for _ in range(_READS))
    finally:
        torch.set_num_threads(before)
    return matrix.nbytes / 1e9 / seconds


def _seconds_of_product(matrix: torch.Tensor, vector: torch.Tensor) -> float:
    began = time.perf_counter()
    matrix.mv(vector)
    return time.perf_counter() - began
