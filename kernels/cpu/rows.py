"""Rows of activations and of what they are looked up in, for steps on a CPU; elsewhere they are a line of torch."""

import torch
from torch import Tensor

from scalellm.kernels.cpu.library import CODES, CpuLibrary


def finite_rows(library: CpuLibrary, x: Tensor) -> Tensor:
    """Return `[T]`, whether all of a row of `x [T, H]` is finite; float32 or bfloat16, numbers of a row adjacent."""
    out = torch.empty(x.shape[0], dtype=torch.bool)
    library.call("finite_rows", CODES[x.dtype], x.data_ptr(), out.data_ptr(), x.shape[0], x.shape[1], x.stride(0))
    return out


def gather_rows(
    library: CpuLibrary, matrix: Tensor, ids: Tensor, *, scale: float = 1.0, out: Tensor | None = None
) -> Tensor:
    """Return rows `ids [T]` i64 of a contiguous `matrix [N, H]`, times `scale`; int32 only without one.

    Raises:
        ValueError: an id is not that of a row.
    """
    num_ids, size = matrix.shape
    out = matrix.new_empty(ids.shape[0], size) if out is None else out[: ids.shape[0]]
    dtype = CODES[torch.float32 if matrix.dtype == torch.int32 else matrix.dtype]
    pointers = matrix.data_ptr(), ids.data_ptr(), out.data_ptr()
    check_ids(library.call("gather_rows", dtype, *pointers, ids.shape[0], size, num_ids, scale), ids, num_ids)
    return out


def check_ids(fault: int, ids: Tensor, num_ids: int) -> None:
    """Raise ValueError if a call named the id that it found fault with."""
    if fault >= 0:
        raise ValueError(f"ids[{fault}] is {int(ids[fault])}, there are {num_ids} rows")
