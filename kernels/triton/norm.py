"""RMSNorm fused with the residual addition before it: one read and one write of each operand."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from scalellm.kernels.launch import Launch
from scalellm.kernels.reference.quant import E4M3, check_epilogue
from scalellm.kernels.triton.overlap import bytes_for_next, fetch_for_next, start_after_the_kernel_before
from scalellm.kernels.triton.quantise import largest_as_scale, scale_of, to_e4m3


@triton.jit
def scaled_by_norm(hidden, rstd, weight, GEMMA: tl.constexpr):
    """Return numbers of rows times the reciprocal of their root mean square and times the norm's weight (float32)."""
    normed = hidden.to(tl.float32) * rstd
    # The two families round at different points; see the reference.
    normed = normed * (weight + 1.0) if GEMMA else normed.to(hidden.dtype).to(tl.float32) * weight
    return normed.to(hidden.dtype)


@triton.jit(do_not_specialize=["share"])
def _add_rms_norm(
    x,
    residual,
    weight,
    out,
    eps,
    quant_scale,
    token_scale,
    ahead,
    share,
    H: tl.constexpr,
    X_STRIDE: tl.constexpr,
    RESIDUAL_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    TOKEN_SCALE_STRIDE: tl.constexpr,
    GEMMA: tl.constexpr,
    SCALE_IN_MEMORY: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    fetch_for_next(ahead, share, OVERLAPS)
    start_after_the_kernel_before(OVERLAPS)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    live = columns < H
    hidden = tl.load(x + row * X_STRIDE + columns, mask=live, other=0.0)
    if residual is not None:
        at = residual + row * RESIDUAL_STRIDE + columns
        before = tl.load(at, mask=live, other=0.0)
        hidden = (before.to(tl.float32) + hidden.to(tl.float32)).to(before.dtype)
        tl.store(at, hidden, mask=live)
    wide = hidden.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(wide * wide, axis=0) / H + eps)
    result = scaled_by_norm(hidden, rstd, tl.load(weight + columns, mask=live, other=0.0).to(tl.float32), GEMMA)
    if quant_scale is not None:
        result = to_e4m3(result.to(tl.float32), scale_of(quant_scale, SCALE_IN_MEMORY))
    elif token_scale is not None:
        rounded = result.to(tl.float32)
        scale = largest_as_scale(rounded, 0)
        tl.store(token_scale + row * TOKEN_SCALE_STRIDE, scale)
        result = to_e4m3(rounded, scale)
    tl.store(out + row * OUT_STRIDE + columns, result.to(out.dtype.element_ty), mask=live)


def fused_add_rms_norm(
    launch: Launch,
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
    """One program per token, the whole row in registers; rows of `x`, `residual` and `out` may have any stride."""
    check_epilogue(quant_scale, token_scale)
    tokens, width = x.shape
    if quant_scale is not None or token_scale is not None:
        launch.capability.require_e4m3("quant_scale" if token_scale is None else "token_scale")
    if out is None:
        plain = quant_scale is None and token_scale is None
        out = torch.empty(x.shape, dtype=x.dtype if plain else E4M3, device=x.device)
    block = triton.next_power_of_2(width)
    launch(
        _add_rms_norm,
        (tokens,),
        x,
        residual,
        weight,
        out,
        eps,
        quant_scale,
        token_scale,
        ahead,
        bytes_for_next(launch, ahead, tokens, tokens),
        num_warps=min(16, max(1, block // 1024)),
        H=width,
        X_STRIDE=x.stride(0),
        RESIDUAL_STRIDE=0 if residual is None else residual.stride(0),
        OUT_STRIDE=out.stride(0),
        TOKEN_SCALE_STRIDE=0 if token_scale is None else token_scale.stride(0),
        GEMMA=gemma,
        SCALE_IN_MEMORY=isinstance(quant_scale, Tensor),
        BLOCK=block,
    )
    return out
