"""Products with packed integers in C++. What they must do is said by the torch forms, `kernels.reference.w4a16`.

Inputs are rounded to 8 bits, to -127 .. 127 times a scale that every group of `group_size` inputs of a row has to
itself, so that the products are those of integers: about as fine as bfloat16, and several times faster than float32.
Sums are of the one row alone, in one order: the result of a row does not depend on the other rows.
"""

import torch
from torch import Tensor

from kernels.cpu.library import CODES, CpuLibrary
from kernels.reference import w4a16 as reference


def w4a16_gemm(
    library: CpuLibrary,
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    *,
    group_size: int,
    workspace: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """C++ form of `kernels.w4a16_gemm`."""
    if not _takes(x, qweight, scales, zeros, 4, group_size, out):
        return reference.w4a16_gemm(x, qweight, scales, zeros, group_size=group_size, out=out)
    return _gemm(library, x, qweight, scales, zeros, 4, group_size, out)


def w8a16_gemm(
    library: CpuLibrary,
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    *,
    group_size: int,
    workspace: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """C++ form of `kernels.w8a16_gemm`."""
    if not _takes(x, qweight, scales, zeros, 8, group_size, out):
        return reference.w8a16_gemm(x, qweight, scales, zeros, group_size=group_size, out=out)
    return _gemm(library, x, qweight, scales, zeros, 8, group_size, out)


def _takes(
    x: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int, out: Tensor | None
) -> bool:
    parts = [scales] if zeros is None else [scales, zeros]
    results = [] if out is None else [out]
    return (
        x.dtype in (torch.float32, torch.bfloat16)
        and all(tensor.dtype == x.dtype and tensor.is_contiguous() for tensor in parts + results)
        and qweight.is_contiguous()
        and group_size % (32 // bits) == 0
    )


def _gemm(
    library: CpuLibrary,
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    out: Tensor | None,
) -> Tensor:
    reference.check_shapes(qweight, scales, zeros, bits, group_size)
    x = x.contiguous()
    (rows, inputs), columns = x.shape, qweight.shape[1]
    if out is None:
        out = x.new_empty(rows, columns)
    pointers = (x.data_ptr(), qweight.data_ptr(), scales.data_ptr(), None if zeros is None else zeros.data_ptr())
    library.call("gemm_wna16", bits, CODES[x.dtype], *pointers, out.data_ptr(), rows, columns, inputs, group_size)
    return out
