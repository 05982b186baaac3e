"""RMSNorm fused with the residual addition before it."""

import torch
from torch import Tensor

from scalellm.kernels.reference.quant import check_epilogue, quantise_tokens, to_e4m3


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, gemma: bool) -> Tensor:
    """Return RMSNorm (Zhang and Sennrich 2019) over the last dimension of `x`, accumulated in float32.

    The two families round at different points, and their weights mean different things:
    Llama rounds `x * rsqrt(...)` to the dtype of `x` and then multiplies by `w`; Gemma multiplies by `1 + w` in float32
    and rounds once. (Rounding `1 + w` to bfloat16 first shifts outputs by up to 3e-2.)
    """
    return scaled_by_norm(x, torch.rsqrt(x.float().square().mean(-1, keepdim=True).add_(eps)), weight, gemma=gemma)


def scaled_by_norm(x: Tensor, rstd: Tensor, weight: Tensor, *, gemma: bool) -> Tensor:
    """Return RMSNorm of `x` given `rstd` [..., 1] f32, the reciprocal of the root of its rows' mean squares."""
    normed = x.float() * rstd
    if gemma:
        return normed.mul_(weight.float() + 1.0).to(x.dtype)
    return normed.to(x.dtype) * weight


def fused_add_rms_norm(
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
    """Add `x` [T, H] into `residual` [T, H] in place and return the RMSNorm of the sum, [T, H].

    Without a residual (the first norm of a model) `x` itself is normalised and left unchanged. The sum is rounded to
    the dtype of the residual before it is normalised, as transformers does. `out` may be `x`.

    Args:
        x: output of the previous sublayer, [T, H].
        residual: the residual stream, updated in place, or None.
        weight: [H]. The Gemma form multiplies by `1 + weight`.
        eps: added to the mean square.
        gemma: chooses the Gemma form; see `rms_norm`.
        quant_scale: static per-tensor scale; the result is divided by it and stored as e4m3.
        token_scale: [T, 1] f32, receives a scale computed for each token; the result is stored as e4m3. It is the
            normalised row, rounded to the dtype of `x`, and then quantised as by `scaled_fp8_quant`: the same scales
            and codes as of the two ops one after the other.
        ahead: a weight that is multiplied next; devices with a large cache bring a part of it there meanwhile.
        out: receives the result.

    Raises:
        ValueError: both quant_scale and token_scale are given.
    """
    check_epilogue(quant_scale, token_scale)
    hidden = x if residual is None else residual.add_(x)
    normed = rms_norm(hidden, weight, eps, gemma=gemma)
    if token_scale is not None:
        return quantise_tokens(normed, token_scale, out)
    if quant_scale is not None:
        normed = to_e4m3(normed, quant_scale)
    return normed if out is None else out.copy_(normed)
