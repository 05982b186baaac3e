"""Low-rank adapters, a different one for each token: one launch for each of the two products.

Every token reads its own adapter. In decode that is what has to be read; the tokens of a prompt share theirs in L2.
No model calls them yet; see `kernels.reference.lora`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from scalellm.kernels.launch import Launch

_BLOCK_R = 8
_BLOCK_H = 512
_BLOCK_N = 128


@triton.jit
def _shrink(
    x,
    a,
    token_lora,
    scaling,
    out,
    H: tl.constexpr,
    R: tl.constexpr,
    X_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    ranks = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    adapter = tl.load(token_lora + token).to(tl.int64)
    result = tl.zeros([BLOCK_R], tl.float32)
    if adapter >= 0:
        acc = tl.zeros([BLOCK_R, BLOCK_H], tl.float32)
        for start in range(0, H, BLOCK_H):
            columns = start + tl.arange(0, BLOCK_H)
            xs = tl.load(x + token * X_STRIDE + columns, mask=columns < H, other=0.0).to(tl.float32)
            at = a + (adapter * R + ranks)[:, None] * H + columns[None, :]
            rows = tl.load(at, mask=(ranks < R)[:, None] & (columns < H)[None, :], other=0.0)
            acc += rows.to(tl.float32) * xs[None, :]
        result = tl.sum(acc, axis=1)
        if scaling is not None:
            result *= tl.load(scaling + adapter)
    tl.store(out + token * OUT_STRIDE + ranks, result, mask=ranks < R)


@triton.jit(do_not_specialize=["offset"])
def _expand(
    y,
    b,
    token_lora,
    out,
    offset,
    N: tl.constexpr,
    R: tl.constexpr,
    Y_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    adapter = tl.load(token_lora + token).to(tl.int64)
    if adapter >= 0:
        columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        ranks = tl.arange(0, BLOCK_R)
        ys = tl.load(y + token * Y_STRIDE + ranks, mask=ranks < R, other=0.0)
        at = b + (adapter * N + columns)[:, None] * R + ranks[None, :]
        rows = tl.load(at, mask=(columns < N)[:, None] & (ranks < R)[None, :], other=0.0)
        update = tl.sum(rows.to(tl.float32) * ys[None, :], axis=1)
        out_at = out + token * OUT_STRIDE + offset + columns
        base = tl.load(out_at, mask=columns < N, other=0.0)
        tl.store(out_at, (base.to(tl.float32) + update).to(base.dtype), mask=columns < N)


def lora_shrink(
    launch: Launch,
    x: Tensor,
    a: Tensor,
    token_lora: Tensor,
    *,
    scaling: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """A program for each token and few ranks; `a` is contiguous."""
    tokens, hidden = x.shape
    rank = a.shape[1]
    if out is None:
        out = torch.empty((tokens, rank), dtype=torch.float32, device=x.device)
    launch(
        _shrink,
        (tokens, triton.cdiv(rank, _BLOCK_R)),
        x,
        a,
        token_lora,
        scaling,
        out,
        H=hidden,
        R=rank,
        X_STRIDE=x.stride(0),
        OUT_STRIDE=out.stride(0),
        BLOCK_R=_BLOCK_R,
        BLOCK_H=_BLOCK_H,
    )
    return out


def lora_expand(launch: Launch, y: Tensor, b: Tensor, token_lora: Tensor, *, out: Tensor, offset: int = 0) -> Tensor:
    """A program for each token and 128 columns; `b` is contiguous."""
    columns, rank = b.shape[1:]
    if offset + columns > out.shape[1]:
        end = offset + columns
        raise ValueError(f"offset: columns {offset} to {end} do not fit in the {out.shape[1]} of out")
    launch(
        _expand,
        (y.shape[0], triton.cdiv(columns, _BLOCK_N)),
        y,
        b,
        token_lora,
        out,
        offset,
        N=columns,
        R=rank,
        Y_STRIDE=y.stride(0),
        OUT_STRIDE=out.stride(0),
        BLOCK_N=_BLOCK_N,
        BLOCK_R=triton.next_power_of_2(rank),
    )
    return out
