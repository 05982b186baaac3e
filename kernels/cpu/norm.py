"""RMSNorm in C++. Specified by the torch form, `kernels.reference.norm`."""

import torch
from torch import Tensor

from scalellm.kernels.cpu.library import CODES, LANES, CpuLibrary
from scalellm.kernels.reference import norm as reference


def fused_add_rms_norm(
    library: CpuLibrary,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    *,
    gemma: bool = False,
    quant_scale: float | Tensor | None = None,
    token_scale: Tensor | None = None,
    ahead: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """C++ form of `kernels.fused_add_rms_norm`; without scales only."""
    if quant_scale is not None or token_scale is not None or not _takes(x, residual, weight, out):
        return reference.fused_add_rms_norm(
            x, residual, weight, eps, gemma=gemma, quant_scale=quant_scale, token_scale=token_scale, out=out
        )
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    library.call(
        "fused_add_rms_norm",
        CODES[x.dtype],
        x.data_ptr(),
        None if residual is None else residual.data_ptr(),
        weight.data_ptr(),
        out.data_ptr(),
        x.shape[0],
        x.shape[1],
        x.stride(0),
        0 if residual is None else residual.stride(0),
        out.stride(0),
        gemma,
        eps,
    )
    return out


def _takes(x: Tensor, residual: Tensor | None, weight: Tensor, out: Tensor | None) -> bool:
    if x.dtype not in (torch.float32, torch.bfloat16) or x.dim() != 2 or x.shape[1] % LANES:
        return False
    alike = all(t is None or (t.dtype == x.dtype and t.shape == x.shape and t.stride(1) == 1) for t in (residual, out))
    return alike and x.stride(1) == 1 and weight.dtype == x.dtype and weight.is_contiguous()
