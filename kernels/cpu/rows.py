"""Checks and gathers of rows, for recorded steps on a CPU. Elsewhere each is one line of torch."""

import torch
from torch import Tensor

from scalellm.kernels.cpu.library import CODES, CpuLibrary


def finite_rows(library: CpuLibrary, x: Tensor) -> Tensor:
    """Return `[T]`, whether all of a row of `x [T, H]` is finite; float32 or bfloat16, numbers of a row adjacent."""
    out = torch.empty(x.shape[0], dtype=torch.bool)
    library.call("finite_rows", CODES[x.dtype], x.data_ptr(), out.data_ptr(), x.shape[0], x.shape[1], x.stride(0))
    return out


def gather_rows(library: CpuLibrary, matrix: Tensor, ids: Tensor, *, out: Tensor) -> Tensor:
    """Write rows `ids [T]` i64 of `matrix [N, H]` i32 to `out[:T]`, and return these; both are contiguous.

    Raises:
        ValueError: an id is not that of a row.
    """
    num_ids, size = matrix.shape
    out = out[: ids.shape[0]]
    pointers = matrix.data_ptr(), ids.data_ptr(), out.data_ptr()
    check_ids(library.call("gather_rows", *pointers, ids.shape[0], size, num_ids), ids, num_ids)
    return out


def check_ids(fault: int, ids: Tensor, num_ids: int) -> None:
    """Raise ValueError if a call returned the index of an invalid id (`fault` other than -1)."""
    if fault >= 0:
        raise ValueError(f"ids[{fault}] is {int(ids[fault])}, there are {num_ids} rows")
