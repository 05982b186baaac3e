"""Quantisation to e4m3 and the product of matrices quantised to it."""

import torch
from torch import Tensor

from scalellm.kernels.reference.scaled_mm import can_scale_mm, has_e4m3_units, scaled_mm

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0

# A row of zeros would give a scale of 0, and 0 / 0.
MIN_SCALE = 1e-12


def check_epilogue(quant_scale: float | Tensor | None, token_scale: Tensor | None) -> None:
    """Refuse two scales for one result.

    Raises:
        ValueError: both a static scale and room for computed ones are given.
    """
    if quant_scale is not None and token_scale is not None:
        raise ValueError("token_scale: not possible together with the static quant_scale")


def to_e4m3(x: Tensor, scale: float | Tensor) -> Tensor:
    """Return `x / scale` in e4m3, clamped to +-448: the format has no infinity, and a bare cast of 449 may be NaN."""
    return (x.float() / scale).clamp_(-E4M3_MAX, E4M3_MAX).to(E4M3)


def scaled_fp8_quant(
    x: Tensor,
    scale: Tensor | None = None,
    *,
    group_size: int | None = None,
    ahead: Tensor | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantise x [T, K] to e4m3; returns (q [T, K], s) with `q * s` close to x.

    Args:
        x: [T, K] of any float dtype.
        scale: static scale of the whole tensor (one element), returned as s. None: scales are computed as
            max |x| / 448, one per token, s [T, 1], or one per group of a token, s [T, K / group_size].
        group_size: consecutive columns that share a computed scale (128 in DeepSeek-V3).
        ahead: a weight that is multiplied next; devices with a large cache bring a part of it there meanwhile.
        out: (q, s) tensors that receive the results.

    Raises:
        ValueError: both scale and group_size are given, or group_size does not divide K.
    """
    tokens, columns = x.shape
    if scale is not None:
        if group_size is not None:
            raise ValueError("group_size: not possible together with a static scale")
        q = to_e4m3(x, scale)
    else:
        if columns % (group_size or columns):
            raise ValueError(f"group_size: {group_size} does not divide the {columns} columns of x")
        groups = x.float().view(tokens, -1, group_size or columns)
        scale = (groups.abs().amax(-1) / E4M3_MAX).clamp_(min=MIN_SCALE)
        q = to_e4m3(groups, scale.unsqueeze(-1)).view(tokens, columns)
    return (q, scale) if out is None else (out[0].copy_(q), out[1].copy_(scale))


def quantise_tokens(x: Tensor, token_scale: Tensor, out: Tensor | None) -> Tensor:
    """Quantise x [T, K] with one computed scale for each token, written to `token_scale` [T, 1]; return the codes."""
    codes = torch.empty(x.shape, dtype=E4M3, device=x.device) if out is None else out
    return scaled_fp8_quant(x, out=(codes, token_scale))[0]


def fp8_gemm(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    *,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    fast_sums: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Return `(a * a_scale) @ (b * b_scale).T + bias`, [M, N], accumulated in float32 and rounded once.

    On a device with such units this is torch's product of e4m3 matrices where it takes the operands (see `scaled_mm`),
    with the bias rounded to the dtype of the result; elsewhere both are widened to float32 first.

    Args:
        a: [M, K] e4m3.
        b: [N, K] e4m3, a weight as checkpoints store it.
        a_scale: one element, [M, 1] (per token) or [M, K / G] (per group of a token).
        b_scale: one element, [N, 1] (per output channel) or [N / G, K / G] (per block).
        bias: [N].
        out_dtype: dtype of a result that is allocated here.
        fast_sums: see `scaled_mm`, which alone can do this; other forms add up in float32 always.
        out: [M, N], receives the result.
    """
    if out is None:
        out = torch.empty((a.shape[0], b.shape[0]), dtype=out_dtype, device=a.device)
    if has_e4m3_units(a.device) and can_scale_mm(a, b, a_scale, b_scale, out):
        return scaled_mm(a, b, a_scale, b_scale, bias, out, fast_sums=fast_sums)
    result = dequantise(a, a_scale) @ dequantise(b, b_scale).T
    if bias is not None:
        result += bias.float()
    return out.copy_(result)


def dequantise(x: Tensor, scale: Tensor | None) -> Tensor:
    """Return x [R, C] in float32, times a scale of one element or of shape [r, c], each element for a block of x.

    Raises:
        ValueError: r does not divide R, or c does not divide C.
    """
    if scale is None:
        return x.float()
    if scale.numel() > 1:
        for dim, size in enumerate(x.shape):
            if size % scale.shape[dim]:
                raise ValueError(f"scale: shape {tuple(scale.shape)} does not divide {tuple(x.shape)}")
            scale = scale.repeat_interleave(size // scale.shape[dim], dim)
    return x.float() * scale
