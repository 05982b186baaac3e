"""The expert layer of a mixture.

For few tokens, time is that of reading the experts that were hit: a grouped product whose blocks of 16 to 64 rows have
one expert each, in the layout of `moe_align_block_size`; its grid is an upper bound, and programs past the last block
leave at once. Blocks are the grid's fastest dimension: those of one expert ask for a tile of its weight at about the
same time, and only the first reads it from memory. (An expert of Mixtral is larger than an H200's second-level cache,
so one block after the other would read all of it anew.) The weight is the left operand of the product: matrix units
multiply tiles of 64 rows of that, of which the few rows of a block would fill a part. For many tokens of unquantised
weights, torch's grouped product. Either way the outputs of a token's experts are written apart and added in a fixed
order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from scalellm.kernels.launch import Launch, next_power_of_2
from scalellm.kernels.reference.quant import E4M3
from scalellm.kernels.tiles import Tile
from scalellm.kernels.triton.activation import silu_and_mul
from scalellm.kernels.triton.moe_layer import MANY_ROWS, Layout, combine, lay_out, many_tokens

_MIN_BLOCK_K = 16


@triton.jit
def _widened(weight, dtype: tl.constexpr):
    """Return a part of a weight in the dtype that it is multiplied in.

    Hopper makes two float16 of two e4m3 numbers by one instruction. From there to bfloat16 the way is by float32: the
    direct conversion is four times as slow, and would take longer than memory does for the numbers.
    """
    if weight.dtype == tl.float8e4nv and dtype == tl.bfloat16:
        weight = weight.to(tl.float16).to(tl.float32)
    return weight.to(dtype)


@triton.jit(do_not_specialize=["pairs"])
def _grouped_gemm(
    x,
    weight,
    scale,
    sorted_token_ids,
    expert_ids,
    used,
    out,
    pairs,
    N: tl.constexpr,
    K: tl.constexpr,
    X_STRIDE: tl.constexpr,
    PAIRS_PER_ROW: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write, for each pair, its row of x times its expert's weight [N, K] to its row of `out` [pairs, N]."""
    block = tl.program_id(0)
    if block * BLOCK_M < tl.load(used):
        pair = tl.load(sorted_token_ids + block * BLOCK_M + tl.arange(0, BLOCK_M))
        live = pair < pairs
        expert = tl.load(expert_ids + block).to(tl.int64)
        columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        live_columns = columns < N
        inner = tl.arange(0, BLOCK_K)
        x_at = x + (pair // PAIRS_PER_ROW).to(tl.int64)[:, None] * X_STRIDE + inner[None, :]
        weight_at = weight + expert * N * K + columns[:, None].to(tl.int64) * K + inner[None, :]
        if scale is not None:
            scale_at = scale + (expert * SCALE_ROWS + columns // (N // SCALE_ROWS)) * SCALE_COLUMNS
        acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for start in range(0, K, BLOCK_K):
            live_inner = inner < K - start
            xs = tl.load(x_at + start, mask=live[:, None] & live_inner[None, :], other=0.0)
            ws = tl.load(weight_at + start, mask=live_columns[:, None] & live_inner[None, :], other=0.0)
            if SCALE_COLUMNS > 1:  # BLOCK_K divides the columns of a scale
                at = scale_at + start // (K // SCALE_COLUMNS)
                part = tl.dot(_widened(ws, xs.dtype), tl.trans(xs), input_precision="ieee")
                acc += part * tl.load(at, mask=live_columns, other=0.0)[:, None]
            else:
                acc = tl.dot(_widened(ws, xs.dtype), tl.trans(xs), acc, input_precision="ieee")
        if SCALE_COLUMNS == 1:
            acc *= tl.load(scale_at, mask=live_columns, other=0.0)[:, None]
        acc = tl.trans(acc)
        at = out + pair.to(tl.int64)[:, None] * N + columns[None, :]
        tl.store(at, acc.to(out.dtype.element_ty), mask=live[:, None] & live_columns[None, :])


def fused_moe(
    launch: Launch,
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    weights: Tensor,
    ids: Tensor,
    *,
    w13_scale: Tensor | None = None,
    w2_scale: Tensor | None = None,
    workspace: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Hidden rows are rounded to the dtype of x, as between the layers of a dense model.

    Weights, scales, `weights` and `ids` are contiguous.

    Raises:
        ValueError: a scale is for blocks of a width that no power of two from 16 on divides.
    """
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    experts, width = w13.shape[:2]
    pairs = ids.numel()
    if pairs == 0:
        return out
    if pairs >= MANY_ROWS * experts and w13.dtype == x.dtype == torch.bfloat16:
        y = many_tokens(launch, x, ids, experts, lambda: w13.transpose(1, 2), lambda: w2.transpose(1, 2))
        return combine(launch, y, weights, out)
    if w13.dtype == E4M3:
        launch.capability.require_e4m3("w13, w2")
    tile = launch.tile("fused_moe", rows_per_expert=pairs // experts, element_size=w13.element_size())
    layout, gate_up, middle, y = lay_out(launch, x, ids, experts, width, tile["block_m"], workspace)
    _grouped(launch, x, w13, w13_scale, layout, gate_up, tile, "w13_scale")
    silu_and_mul(launch, gate_up, out=middle)
    _grouped(launch, middle, w2, w2_scale, layout, y, tile, "w2_scale")
    return combine(launch, y, weights, out)


def _grouped(
    launch: Launch,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    layout: Layout,
    out: Tensor,
    tile: Tile,
    name: str,
) -> None:
    _, n, k = weight.shape
    pairs = out.shape[0]
    scale_rows, scale_columns = (0, 0) if scale is None else tuple(scale.shape[1:])
    block_k = min(tile["block_k"], max(_MIN_BLOCK_K, next_power_of_2(k)))
    if scale_columns > 1:
        block_k = min(block_k, (k // scale_columns) & -(k // scale_columns))
        if block_k < _MIN_BLOCK_K:
            raise ValueError(f"{name}: blocks of {k // scale_columns} columns; the width must be a multiple of 16")
    blocks = min(pairs, layout[1].shape[0])  # every block has a pair
    launch(
        _grouped_gemm,
        (blocks, triton.cdiv(n, tile["block_n"])),
        x,
        weight,
        scale,
        *layout,
        out,
        pairs,
        num_warps=tile["num_warps"],
        num_stages=tile["num_stages"],
        N=n,
        K=k,
        X_STRIDE=x.stride(0),
        PAIRS_PER_ROW=pairs // x.shape[0],
        SCALE_ROWS=scale_rows,
        SCALE_COLUMNS=scale_columns,
        BLOCK_M=tile["block_m"],
        BLOCK_N=tile["block_n"],
        BLOCK_K=block_k,
    )
