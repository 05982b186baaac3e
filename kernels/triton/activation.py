"""Gated activations of the packed gate/up projection."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import Launch
from kernels.reference.quant import E4M3
from kernels.triton.quantise import scale_of, to_e4m3

_BLOCK = 1024


@triton.jit
def _gate_and_mul(
    x,
    out,
    quant_scale,
    F: tl.constexpr,
    X_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    GELU: tl.constexpr,
    SCALE_IN_MEMORY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = columns < F
    at = x + row * X_STRIDE + columns
    packed = tl.load(at, mask=live, other=0.0)
    gate = packed.to(tl.float32)
    up = tl.load(at + F, mask=live, other=0.0).to(tl.float32)
    if GELU:  # (1 + tanh(u)) / 2 is sigmoid(2u), and does not cancel where the gate is very negative
        inner = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    else:
        inner = gate
    activated = (gate / (1.0 + tl.exp(-inner))).to(packed.dtype).to(tl.float32)
    if quant_scale is not None:
        result = to_e4m3(activated * up, scale_of(quant_scale, SCALE_IN_MEMORY))
    else:
        result = (activated * up).to(out.dtype.element_ty)
    tl.store(out + row * OUT_STRIDE + columns, result, mask=live)


def silu_and_mul(
    launch: Launch, x: Tensor, *, quant_scale: float | Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """SwiGLU in one pass; rows of `x` and `out` may have any stride."""
    return _gated(launch, x, quant_scale, out, gelu=False)


def gelu_tanh_and_mul(
    launch: Launch, x: Tensor, *, quant_scale: float | Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """GeGLU, otherwise as `silu_and_mul`."""
    return _gated(launch, x, quant_scale, out, gelu=True)


def _gated(launch: Launch, x: Tensor, quant_scale: float | Tensor | None, out: Tensor | None, *, gelu: bool) -> Tensor:
    tokens, width = x.shape[0], x.shape[1] // 2
    if out is None:
        out = torch.empty((tokens, width), dtype=x.dtype if quant_scale is None else E4M3, device=x.device)
    launch(
        _gate_and_mul,
        (tokens, triton.cdiv(width, _BLOCK)),
        x,
        out,
        quant_scale,
        F=width,
        X_STRIDE=x.stride(0),
        OUT_STRIDE=out.stride(0),
        GELU=gelu,
        SCALE_IN_MEMORY=isinstance(quant_scale, Tensor),
        BLOCK=_BLOCK,
    )
    return out
