"""Gated activations of the packed gate/up projection."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from scalellm.kernels.launch import Launch, next_power_of_2
from scalellm.kernels.reference.quant import E4M3, check_epilogue
from scalellm.kernels.triton.overlap import bytes_for_next, fetch_for_next, start_after_the_kernel_before
from scalellm.kernels.triton.quantise import largest_as_scale, scale_of, to_e4m3

_BLOCK = 1024


@triton.jit
def activated_product(rounded_gate, up, GELU: tl.constexpr):
    """Return activation(gate) * up in float32, the first factor rounded to the dtype of the gate."""
    gate = rounded_gate.to(tl.float32)
    if GELU:  # (1 + tanh(u)) / 2 is sigmoid(2u), and does not cancel where the gate is very negative
        inner = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    else:
        inner = gate
    return (gate / (1.0 + tl.exp(-inner))).to(rounded_gate.dtype).to(tl.float32) * up.to(tl.float32)


@triton.jit
def _activated_row(x_at, live, F: tl.constexpr, GELU: tl.constexpr):
    gate, up = tl.load(x_at, mask=live, other=0.0), tl.load(x_at + F, mask=live, other=0.0)
    return activated_product(gate, up, GELU)


@triton.jit(do_not_specialize=["share"])
def _gate_and_mul(
    x,
    out,
    quant_scale,
    ahead,
    share,
    F: tl.constexpr,
    X_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    GELU: tl.constexpr,
    SCALE_IN_MEMORY: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    fetch_for_next(ahead, share, OVERLAPS)
    start_after_the_kernel_before(OVERLAPS)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = columns < F
    product = _activated_row(x + row * X_STRIDE + columns, live, F, GELU)
    if quant_scale is not None:
        result = to_e4m3(product, scale_of(quant_scale, SCALE_IN_MEMORY))
    else:
        result = product.to(out.dtype.element_ty)
    tl.store(out + row * OUT_STRIDE + columns, result, mask=live)


@triton.jit(do_not_specialize=["share"])
def _gate_and_mul_tokens(
    x,
    out,
    token_scale,
    ahead,
    share,
    F: tl.constexpr,
    X_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    TOKEN_SCALE_STRIDE: tl.constexpr,
    GELU: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Quantise each row by its own largest magnitude: one program holds the row in registers."""
    fetch_for_next(ahead, share, OVERLAPS)
    start_after_the_kernel_before(OVERLAPS)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    live = columns < F
    product = _activated_row(x + row * X_STRIDE + columns, live, F, GELU)
    rounded = product.to(x.dtype.element_ty).to(tl.float32)
    scale = largest_as_scale(rounded, 0)
    tl.store(token_scale + row * TOKEN_SCALE_STRIDE, scale)
    tl.store(out + row * OUT_STRIDE + columns, to_e4m3(rounded, scale), mask=live)


def silu_and_mul(
    launch: Launch,
    x: Tensor,
    *,
    quant_scale: float | Tensor | None = None,
    token_scale: Tensor | None = None,
    ahead: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """SwiGLU in one pass; rows of `x` and `out` may have any stride."""
    return _gated(launch, x, quant_scale, token_scale, ahead, out, gelu=False)


def gelu_tanh_and_mul(
    launch: Launch,
    x: Tensor,
    *,
    quant_scale: float | Tensor | None = None,
    token_scale: Tensor | None = None,
    ahead: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """GeGLU, otherwise as `silu_and_mul`."""
    return _gated(launch, x, quant_scale, token_scale, ahead, out, gelu=True)


def _gated(
    launch: Launch,
    x: Tensor,
    quant_scale: float | Tensor | None,
    token_scale: Tensor | None,
    ahead: Tensor | None,
    out: Tensor | None,
    *,
    gelu: bool,
) -> Tensor:
    check_epilogue(quant_scale, token_scale)
    tokens, width = x.shape[0], x.shape[1] // 2
    if quant_scale is not None or token_scale is not None:
        launch.capability.require_e4m3("quant_scale" if token_scale is None else "token_scale")
    if out is None:
        plain = quant_scale is None and token_scale is None
        out = torch.empty((tokens, width), dtype=x.dtype if plain else E4M3, device=x.device)
    shape = {"F": width, "X_STRIDE": x.stride(0), "OUT_STRIDE": out.stride(0), "GELU": gelu}
    if token_scale is not None:
        block = next_power_of_2(width)
        warps = min(32, max(4, block // 1024))
        stride = {"TOKEN_SCALE_STRIDE": token_scale.stride(0)}
        fetched = ahead, bytes_for_next(launch, ahead, tokens, tokens)
        arguments = x, out, token_scale, *fetched
        launch(_gate_and_mul_tokens, (tokens,), *arguments, num_warps=warps, **shape, **stride, BLOCK=block)
        return out
    in_memory = isinstance(quant_scale, Tensor)
    grid = tokens, triton.cdiv(width, _BLOCK)
    fetched = ahead, bytes_for_next(launch, ahead, tokens, grid[0] * grid[1])
    launch(_gate_and_mul, grid, x, out, quant_scale, *fetched, **shape, SCALE_IN_MEMORY=in_memory, BLOCK=_BLOCK)
    return out
