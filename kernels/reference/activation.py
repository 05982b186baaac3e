"""Gated activations of the packed gate/up projection."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.reference.quant import E4M3, to_e4m3


def silu_and_mul(x: Tensor, *, quant_scale: float | Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """Return `silu(x[:, :F]) * x[:, F:]` (SwiGLU, Shazeer 2020; Llama, Qwen, Mistral).

    `x` is [T, 2F], gate first. The gate is rounded to the dtype of `x` before the product, as transformers does.
    With `quant_scale` (static, per tensor) the result is divided by it and stored as e4m3.
    """
    gate, up = x.chunk(2, dim=-1)
    return _gated(F.silu(gate), up, quant_scale, out)


def gelu_tanh_and_mul(x: Tensor, *, quant_scale: float | Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """Return `gelu_tanh(x[:, :F]) * x[:, F:]` (GeGLU, tanh approximation; Gemma). Otherwise as `silu_and_mul`."""
    gate, up = x.chunk(2, dim=-1)
    return _gated(F.gelu(gate, approximate="tanh"), up, quant_scale, out)


def _gated(gate: Tensor, up: Tensor, quant_scale: float | Tensor | None, out: Tensor | None) -> Tensor:
    if quant_scale is None:
        return torch.mul(gate, up, out=out)
    if out is None:
        out = torch.empty(up.shape, dtype=E4M3, device=up.device)
    return out.copy_(to_e4m3(gate.float() * up.float(), quant_scale))
