"""Gated activations in C++. Their specification is the docstrings of the torch forms,
`kernels.reference.activation`."""

import torch
from torch import Tensor

from scalellm.kernels.cpu.library import CODES, CpuLibrary
from scalellm.kernels.reference import activation as reference

_SILU, _GELU_TANH = 0, 1


def silu_and_mul(
    library: CpuLibrary,
    x: Tensor,
    *,
    quant_scale: float | Tensor | None = None,
    token_scale: Tensor | None = None,
    ahead: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """C++ form of `kernels.silu_and_mul`; without scales only."""
    if quant_scale is not None or token_scale is not None or not _takes(x, out):
        return reference.silu_and_mul(x, quant_scale=quant_scale, token_scale=token_scale, out=out)
    return _gated(library, _SILU, x, out)


def gelu_tanh_and_mul(
    library: CpuLibrary,
    x: Tensor,
    *,
    quant_scale: float | Tensor | None = None,
    token_scale: Tensor | None = None,
    ahead: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """C++ form of `kernels.gelu_tanh_and_mul`; without scales only."""
    if quant_scale is not None or token_scale is not None or not _takes(x, out):
        return reference.gelu_tanh_and_mul(x, quant_scale=quant_scale, token_scale=token_scale, out=out)
    return _gated(library, _GELU_TANH, x, out)


def _takes(x: Tensor, out: Tensor | None) -> bool:
    if x.dtype not in (torch.float32, torch.bfloat16) or x.stride(1) != 1:
        return False
    rows, columns = x.shape
    return out is None or (out.dtype == x.dtype and out.shape == (rows, columns // 2) and out.stride(1) == 1)


def _gated(library: CpuLibrary, activation: int, x: Tensor, out: Tensor | None) -> Tensor:
    rows, columns = x.shape[0], x.shape[1] // 2
    if out is None:
        out = x.new_empty(rows, columns)
    dtype, pointers = CODES[x.dtype], (x.data_ptr(), out.data_ptr())
    library.call("gated_activation", activation, dtype, *pointers, rows, columns, x.stride(0), out.stride(0))
    return out
