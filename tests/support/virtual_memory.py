"""Tensors larger than the machine's memory, of which a test touches a few pages."""

import math
import mmap

import torch

_NORESERVE = 0x4000  # Linux's; the module names it from Python 3.13 on


def virtual_tensor(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Return zeros that take memory only where they are touched, however little the system is ready to promise."""
    size = math.prod(shape) * dtype.itemsize
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(shape)
