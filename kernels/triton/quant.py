"""Quantisation to e4m3, and the product of matrices quantised to it."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from scalellm.kernels.launch import Launch
from scalellm.kernels.reference.quant import E4M3
from scalellm.kernels.triton.overlap import bytes_for_next, fetch_for_next, start_after_the_kernel_before
from scalellm.kernels.triton.quantise import largest_as_scale, to_e4m3

_BLOCK = 1024


@triton.jit(do_not_specialize=["share"])
def _quantise_static(
    x,
    scale,
    q,
    ahead,
    share,
    K: tl.constexpr,
    X_STRIDE: tl.constexpr,
    Q_STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    fetch_for_next(ahead, share, OVERLAPS)
    start_after_the_kernel_before(OVERLAPS)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = columns < K
    value = tl.load(x + row * X_STRIDE + columns, mask=live, other=0.0).to(tl.float32)
    tl.store(q + row * Q_STRIDE + columns, to_e4m3(value, tl.load(scale).to(tl.float32)), mask=live)


@triton.jit(do_not_specialize=["share"])
def _quantise_groups(
    x,
    q,
    s,
    ahead,
    share,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    X_STRIDE: tl.constexpr,
    Q_STRIDE: tl.constexpr,
    S_STRIDE: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    fetch_for_next(ahead, share, OVERLAPS)
    start_after_the_kernel_before(OVERLAPS)
    row = tl.program_id(0).to(tl.int64)
    groups = tl.program_id(1) * BLOCK_GROUPS + tl.arange(0, BLOCK_GROUPS)
    inner = tl.arange(0, BLOCK)
    columns = groups[:, None] * GROUP + inner[None, :]
    live = (groups < GROUPS)[:, None] & (inner < GROUP)[None, :]
    value = tl.load(x + row * X_STRIDE + columns, mask=live, other=0.0).to(tl.float32)
    scale = largest_as_scale(value, 1)
    tl.store(q + row * Q_STRIDE + columns, to_e4m3(value, scale[:, None]), mask=live)
    tl.store(s + row * S_STRIDE + groups, scale, mask=groups < GROUPS)


def scaled_fp8_quant(
    launch: Launch,
    x: Tensor,
    scale: Tensor | None = None,
    *,
    group_size: int | None = None,
    ahead: Tensor | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """One program per token (or per few groups of one), which finds the scale and quantises from registers."""
    tokens, columns = x.shape
    if scale is not None:
        if group_size is not None:
            raise ValueError("group_size: not possible together with a static scale")
        q = torch.empty(x.shape, dtype=E4M3, device=x.device) if out is None else out[0]
        blocks = triton.cdiv(columns, _BLOCK)
        launch(
            _quantise_static,
            (tokens, blocks),
            x,
            scale,
            q,
            ahead,
            bytes_for_next(launch, ahead, tokens, tokens * blocks),
            K=columns,
            X_STRIDE=x.stride(0),
            Q_STRIDE=q.stride(0),
            BLOCK=_BLOCK,
        )
        return (q, scale) if out is None else (q, out[1].copy_(scale))
    group = group_size or columns
    if columns % group:
        raise ValueError(f"group_size: {group_size} does not divide the {columns} columns of x")
    groups = columns // group
    if out is None:
        q = torch.empty(x.shape, dtype=E4M3, device=x.device)
        s = torch.empty((tokens, groups), dtype=torch.float32, device=x.device)
    else:
        q, s = out
    block = triton.next_power_of_2(group)
    block_groups = min(triton.next_power_of_2(groups), max(1, _BLOCK // block))
    blocks = triton.cdiv(groups, block_groups)
    launch(
        _quantise_groups,
        (tokens, blocks),
        x,
        q,
        s,
        ahead,
        bytes_for_next(launch, ahead, tokens, tokens * blocks),
        num_warps=min(16, max(4, block // 1024)),
        GROUPS=groups,
        GROUP=group,
        X_STRIDE=x.stride(0),
        Q_STRIDE=q.stride(0),
        S_STRIDE=s.stride(0),
        BLOCK_GROUPS=block_groups,
        BLOCK=block,
    )
    return q, s
