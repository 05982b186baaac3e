"""Gated activations of the packed gate/up projection."""

import torch
import torch.nn.functional as F
from torch import Tensor

from scalellm.kernels.reference.quant import E4M3, check_epilogue, quantise_tokens, to_e4m3


def silu_and_mul(
    x: Tensor,
    *,
    quant_scale: float | Tensor | None = None,
    token_scale: Tensor | None = None,
    ahead: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Return `silu(x[:, :F]) * x[:, F:]` (SwiGLU, Shazeer 2020; Llama, Qwen, Mistral).

    `x` is [T, 2F], gate first. The gate is rounded to the dtype of `x` before the product, as transformers does.
    With `quant_scale` (static, per tensor) the result is divided by it and stored as e4m3. With `token_scale` [T, 1]
    f32, which receives a scale computed for each token, the result is rounded to the dtype of `x` and then quantised as
    by `scaled_fp8_quant`: the same scales and codes as of the two ops one after the other. `ahead` is a weight that is
    multiplied next: devices with a large cache bring a part of it there meanwhile.

    Raises:
        ValueError: both quant_scale and token_scale are given.
    """
    gate, up = x.chunk(2, dim=-1)
    return _gated(F.silu(gate), up, quant_scale, token_scale, out)


def gelu_tanh_and_mul(
    x: Tensor,
    *,
    quant_scale: float | Tensor | None = None,
    token_scale: Tensor | None = None,
    ahead: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Return `gelu_tanh(x[:, :F]) * x[:, F:]` (GeGLU, tanh approximation; Gemma). Otherwise as `silu_and_mul`."""
    gate, up = x.chunk(2, dim=-1)
    return _gated(F.gelu(gate, approximate="tanh"), up, quant_scale, token_scale, out)


def _gated(
    gate: Tensor, up: Tensor, quant_scale: float | Tensor | None, token_scale: Tensor | None, out: Tensor | None
) -> Tensor:
    check_epilogue(quant_scale, token_scale)
    if token_scale is not None:
        return quantise_tokens(gate * up, token_scale, out)
    if quant_scale is None:
        return torch.mul(gate, up, out=out)
    if out is None:
        out = torch.empty(up.shape, dtype=E4M3, device=up.device)
    return out.copy_(to_e4m3(gate.float() * up.float(), quant_scale))
