"""Rows of activations, for the recorded steps of a CPU; elsewhere they are a line of torch."""

import torch
from torch import Tensor

from kernels.cpu.library import CODES, CpuLibrary


def finite_rows(library: CpuLibrary, x: Tensor) -> Tensor:
    """Return `[T]`, whether all of a row of `x [T, H]` is finite; float32 or bfloat16, numbers of a row adjacent."""
    out = torch.empty(x.shape[0], dtype=torch.bool)
    library.call("finite_rows", CODES[x.dtype], x.data_ptr(), out.data_ptr(), x.shape[0], x.shape[1], x.stride(0))
    return out
