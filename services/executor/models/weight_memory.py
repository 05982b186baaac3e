"""Memory of weights, keys and values on a CPU: huge pages, if the system has them.

Each token reads all of them once, so that with pages of 4 KiB nearly every access to a new page would miss the TLB.
"""

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

_CHUNK = 64 << 20
_ALIGNMENT = 64  # a cache line


class WeightMemory:
    """Gives out parts of large chunks, which last as long as one of their parts."""

    def __init__(self) -> None:
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def allocate(self, shape: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return an uninitialised tensor, as `torch.empty` does; memory that is never written costs nothing."""
        if device.type != "cpu":
            return torch.empty(shape, dtype=dtype, device=device)
        size = math.prod(shape) * dtype.itemsize
        if self._used + size > len(self._chunk):
            self._chunk, self._used = zero_pages(max(size, _CHUNK)), 0
        part = self._chunk[self._used : self._used + size]
        self._used += -(-size // _ALIGNMENT) * _ALIGNMENT
        return part.view(dtype).view(tuple(shape))


def zero_pages(size: int) -> Tensor:
    """Return `size` bytes of zeros, which take time and memory only when they are first used."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared memory has no huge pages
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
