"""The expert layer of a mixture with weights of 4 and 8 bits.

For few tokens, as `moe`, with a grouped product that reads packed weights and unpacks them in registers, as
`gemm_wna16` does. For many tokens in bfloat16 the experts are unpacked for torch's grouped product, the two matrices
one after the other, which takes that much memory for the time of the call.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from scalellm.kernels.launch import Launch
from scalellm.kernels.reference.moe import check_packed_experts
from scalellm.kernels.tiles import Tile
from scalellm.kernels.triton.activation import silu_and_mul
from scalellm.kernels.triton.gemm_wna16 import dequantised, packed_product
from scalellm.kernels.triton.moe_layer import MANY_ROWS, Layout, combine, lay_out, many_tokens


@triton.jit(do_not_specialize=["pairs"])
def _grouped_gemm_packed(
    x,
    words,
    scales,
    zeros,
    sorted_token_ids,
    expert_ids,
    used,
    out,
    pairs,
    K: tl.constexpr,
    N: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    INTERLEAVE: tl.constexpr,
    X_STRIDE: tl.constexpr,
    PAIRS_PER_ROW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Write, for each pair, its row of x times its expert's weight [K, N] to its row of `out` [pairs, N]."""
    PACK: tl.constexpr = 32 // BITS
    block = tl.program_id(0)
    if block * BLOCK_M < tl.load(used):
        pair = tl.load(sorted_token_ids + block * BLOCK_M + tl.arange(0, BLOCK_M))
        live = pair < pairs
        expert = tl.load(expert_ids + block).to(tl.int64)
        columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        x_rows = x + (pair // PAIRS_PER_ROW).to(tl.int64) * X_STRIDE
        words += expert * (K // PACK) * N
        scales += expert * (K // GROUP) * N
        if zeros is not None:
            zeros += expert * (K // GROUP) * N
        acc = packed_product(
            x_rows,
            live,
            words,
            scales,
            zeros,
            columns,
            0,
            K // PACK,
            K,
            N,
            GROUP,
            BITS,
            INTERLEAVE,
            BLOCK_M,
            BLOCK_N,
            WORDS,
        )
        live_columns = (columns < N) | (N % BLOCK_N == 0)
        at = out + pair.to(tl.int64)[:, None] * N + columns[None, :]
        tl.store(at, acc.to(out.dtype.element_ty), mask=live[:, None] & live_columns[None, :])


def fused_moe_wna16(
    launch: Launch,
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    weights: Tensor,
    ids: Tensor,
    *,
    w13_scales: Tensor,
    w2_scales: Tensor,
    w13_zeros: Tensor | None = None,
    w2_zeros: Tensor | None = None,
    bits: int,
    group_size: int,
    interleave: int = 1,
    workspace: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Hidden rows are rounded to the dtype of x; all operands but `x` and `out` are contiguous."""
    check_packed_experts(w13, w2, w13_scales, w2_scales, w13_zeros, w2_zeros, bits, group_size, interleave)
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    experts, width = w13.shape[0], w13.shape[2]
    pairs = ids.numel()
    if pairs == 0:
        return out
    up, down = (w13, w13_scales, w13_zeros), (w2, w2_scales, w2_zeros)
    if pairs >= MANY_ROWS * experts and x.dtype == torch.bfloat16:
        form = bits, group_size, interleave, x.dtype
        y = many_tokens(
            launch, x, ids, experts, lambda: dequantised(launch, *up, *form), lambda: dequantised(launch, *down, *form)
        )
        return combine(launch, y, weights, out)
    tile = launch.tile("fused_moe_wna16", rows_per_expert=pairs // experts, bits=bits, group_size=group_size)
    layout, gate_up, middle, y = lay_out(launch, x, ids, experts, width, tile["block_m"], workspace)
    _grouped(launch, x, up, layout, gate_up, tile, bits, group_size, interleave)
    silu_and_mul(launch, gate_up, out=middle)
    _grouped(launch, middle, down, layout, y, tile, bits, group_size, interleave)
    return combine(launch, y, weights, out)


def _grouped(
    launch: Launch,
    x: Tensor,
    weight: tuple[Tensor, Tensor, Tensor | None],
    layout: Layout,
    out: Tensor,
    tile: Tile,
    bits: int,
    group_size: int,
    interleave: int,
) -> None:
    _, words, columns = weight[0].shape
    pairs = out.shape[0]
    blocks = min(pairs, layout[1].shape[0])  # every block has a pair
    launch(
        _grouped_gemm_packed,
        (blocks, triton.cdiv(columns, tile["block_n"])),
        x,
        *weight,
        *layout,
        out,
        pairs,
        num_warps=tile["num_warps"],
        num_stages=tile["num_stages"],
        K=words * (32 // bits),
        N=columns,
        GROUP=group_size,
        BITS=bits,
        INTERLEAVE=interleave,
        X_STRIDE=x.stride(0),
        PAIRS_PER_ROW=pairs // x.shape[0],
        BLOCK_M=tile["block_m"],
        BLOCK_N=tile["block_n"],
        WORDS=tile["words"],
    )
