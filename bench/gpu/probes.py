"""Kernels that measure the machine, not us."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _sum_blocks(x, out, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * (BLOCK * STEPS)
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(STEPS):
        total += tl.load(x + start + i * BLOCK + tl.arange(0, BLOCK))
    tl.store(out + tl.program_id(0), tl.sum(total))


@triton.jit
def _add_one(x):
    tl.store(x, tl.load(x) + 1)


class ReadOnly:
    """Reads a float32 tensor whole, and writes next to nothing."""

    def __init__(self, num_elements: int, device: torch.device, *, block: int = 4096, steps: int = 8) -> None:
        self._block, self._steps = block, steps
        self._programs = max(1, num_elements // (block * steps))
        self._x = torch.randn(self._programs * block * steps, device=device)
        self._out = torch.empty(self._programs, device=device)

    @property
    def num_bytes(self) -> int:
        """Bytes read by a call."""
        return self._x.numel() * 4

    def __call__(self) -> None:
        _sum_blocks[(self._programs,)](self._x, self._out, BLOCK=self._block, STEPS=self._steps, num_warps=8)

    def exact(self) -> bool:
        """True if the sums are right, so that nothing was left unread."""
        expected = self._x.view(self._programs, -1).double().sum(1)
        return torch.allclose(self._out.double(), expected, rtol=1e-4, atol=1e-2)


def add_one(x: Tensor) -> None:
    """Launch the smallest kernel: what is left of its time in a graph is the gap between kernels."""
    _add_one[(1,)](x, num_warps=1)
