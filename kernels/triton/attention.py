"""Attention over the paged cache for any mix of prompts, chunks and decode rows, in one launch.

The queries of a kv head's group are packed into the rows of one tile, so K and V are read once for the group, and the
grid is one-dimensional over tiles of all sequences: a tile finds its sequence by binary search, so the host never needs
the lengths (after "The Anatomy of a Triton Attention Kernel", arXiv 2511.11581; the inner loop is FlashAttention-2's).

With wgmma a tile of 128 rows needs 8 warps: with 4 its accumulator alone fills the registers (137 spills). Without it
(sm_80) operands are in registers, too, and 64 rows are what fits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from scalellm.kernels.launch import Launch, next_power_of_2
from scalellm.kernels.reference.quant import E4M3
from scalellm.kernels.triton.quantise import scale_of

LOG2E = 1.4426950408889634


def unified_attention(
    launch: Launch,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    *,
    max_seqlen_q: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    k_scale: float | Tensor | None = None,
    v_scale: float | Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """See the torch form. A sequence with more query tokens than tokens is not refused; its surplus rows are zero."""
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise ValueError("k_cache, v_cache: must be contiguous")
    if k_cache.dtype == E4M3:
        launch.capability.require_e4m3("k_cache, v_cache")
    out = torch.empty_like(q) if out is None else out
    tokens, q_heads, head_dim = q.shape
    page, kv_heads = k_cache.shape[1:3]
    group = q_heads // kv_heads
    tile = launch.tile("unified_attention", element_size=q.element_size(), head_dim=head_dim, rows=max_seqlen_q * group)
    block_m = max(tile["block_m"], next_power_of_2(group))
    num_seqs = seq_lens.shape[0]
    # A sequence of n queries takes at most n // (rows per tile) + 1 tiles. Rows after the last sequence are one more.
    grid = (tokens // (block_m // group) + num_seqs + 1 if tokens else 0, kv_heads)
    launch(
        _unified_attention,
        grid,
        q,
        k_cache,
        v_cache,
        cu_seqlens_q,
        seq_lens,
        block_table,
        sinks,
        1.0 if k_scale is None else k_scale,
        1.0 if v_scale is None else v_scale,
        out,
        num_seqs,
        tokens,
        block_table.stride(0),
        scale / softcap if softcap else scale * LOG2E,
        softcap * LOG2E,
        num_warps=tile["num_warps"],
        num_stages=tile["num_stages"],
        Q_STRIDE_T=q.stride(0),
        Q_STRIDE_H=q.stride(1),
        OUT_STRIDE_T=out.stride(0),
        OUT_STRIDE_H=out.stride(1),
        KV_HEADS=kv_heads,
        GROUP=group,
        D=head_dim,
        PADDED_D=next_power_of_2(head_dim),
        PAGE=page,
        BLOCK_M=block_m,
        BLOCK_N=tile["block_n"],
        WINDOW=window,
        SOFTCAP=softcap > 0,
        K_SCALE_IN_MEMORY=isinstance(k_scale, Tensor),
        V_SCALE_IN_MEMORY=isinstance(v_scale, Tensor),
    )
    return out


@triton.jit
def blocks_of(table, at, start, stop, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the cache block that the tile of keys from `at` is in, or where a tile is in several, that of each key.

    A loop over tiles asks for the block of the next tile and hands it on. If it asked for that of its own, each load of
    keys would wait for one of a block id, and Triton's pipeline, which starts chained loads a turn apart, would have no
    turn left in which keys are under way.
    """
    if PAGE % BLOCK_N == 0:
        block = tl.load(table + at // PAGE, mask=at < stop, other=0)
    else:
        key = at + tl.arange(0, BLOCK_N)
        block = tl.load(table + key // PAGE, mask=(key >= start) & (key < stop), other=0)
    return block.to(tl.int64)


@triton.jit
def slots_of(block, at, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the slots [BLOCK_N] of the keys from `at`, which are in the blocks of `blocks_of`."""
    if PAGE % BLOCK_N == 0:
        slots = block * PAGE + at % PAGE + tl.arange(0, BLOCK_N)
    else:
        slots = block * PAGE + (at + tl.arange(0, BLOCK_N)) % PAGE
    return slots


@triton.jit
def as_multiplied(q, CACHE_DTYPE: tl.constexpr):
    """Return queries in the dtype that they are multiplied in with keys and values of the cache's dtype.

    Every e4m3 number is one of float16, and the conversion is one instruction for two; to bfloat16 it is three for one.
    A finite query beyond float16's range, which no model has, becomes the largest number of it.
    """
    if q.dtype == tl.bfloat16 and CACHE_DTYPE == tl.float8e4nv:  # noqa: SIM300 (a type, in capitals)
        wide = q.to(tl.float32)
        bounded = tl.minimum(tl.maximum(wide, -65504.0), 65504.0)
        q = tl.where(tl.abs(wide) < float("inf"), bounded, wide).to(tl.float16)
    return q


@triton.jit
def capped(scores, cap):
    """Return `cap * tanh(scores)`."""
    return cap - 2.0 * cap / (tl.math.exp2(scores * 2.8853900817779268) + 1.0)


@triton.jit(do_not_specialize=["num_seqs", "num_tokens", "block_table_stride"])
def _unified_attention(
    q_ptr,
    k_ptr,
    v_ptr,
    cu_seqlens_ptr,
    seq_lens_ptr,
    block_table_ptr,
    sinks_ptr,
    k_scale,
    v_scale,
    out_ptr,
    num_seqs,
    num_tokens,
    block_table_stride,
    score_scale,  # of q.k: gives powers of two, or with SOFTCAP the argument of tanh
    cap,  # times log2(e)
    Q_STRIDE_T: tl.constexpr,
    Q_STRIDE_H: tl.constexpr,
    OUT_STRIDE_T: tl.constexpr,
    OUT_STRIDE_H: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    PADDED_D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    K_SCALE_IN_MEMORY: tl.constexpr,
    V_SCALE_IN_MEMORY: tl.constexpr,
):
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)

    # Sequence s begins at tile cu_seqlens[s] // BLOCK_Q + s. Rows after the last one are a sequence without tokens.
    low = 0
    high = num_seqs + 1
    while low < high:
        middle = (low + high) // 2
        if tl.load(cu_seqlens_ptr + middle) // BLOCK_Q + middle <= tile:
            low = middle + 1
        else:
            high = middle
    seq = low - 1
    begin = tl.load(cu_seqlens_ptr + seq)
    end = num_tokens
    length = 0
    if seq < num_seqs:
        end = tl.load(cu_seqlens_ptr + seq + 1)
        length = tl.load(seq_lens_ptr + seq)
    first_query = (tile - begin // BLOCK_Q - seq) * BLOCK_Q  # of this tile, counted from `begin`
    num_queries = end - begin
    if first_query >= num_queries:
        return

    # Rows of the tile: BLOCK_Q queries times GROUP heads. A GROUP of 3, 5 or 7 leaves rows over, which must not store.
    row = tl.arange(0, BLOCK_M)
    dim = tl.arange(0, PADDED_D)
    query = first_query + row // GROUP
    head = kv_head * GROUP + row % GROUP
    row_live = (row < BLOCK_Q * GROUP) & (query < num_queries)
    mask = row_live[:, None] & (dim < D)[None, :]
    token = (begin + query).to(tl.int64)
    q = tl.load(q_ptr + (token * Q_STRIDE_T + head * Q_STRIDE_H)[:, None] + dim[None, :], mask=mask, other=0.0)
    q = as_multiplied(q, k_ptr.dtype.element_ty)
    context = length - num_queries
    position = context + query

    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head, mask=row_live, other=0.0).to(tl.float32)
        highest = sink * 1.4426950408889634
        total += 1.0
    weighted = tl.zeros([BLOCK_M, PADDED_D], tl.float32)

    score_scale *= scale_of(k_scale, K_SCALE_IN_MEMORY)

    # Keys that any row of the tile may see. The others are not read: anything may stand there, and 0 * NaN is NaN.
    stop = tl.minimum(length, context + first_query + BLOCK_Q)
    start = 0
    if WINDOW > 0:
        start = tl.maximum(0, context + first_query - WINDOW + 1)
    table = block_table_ptr + seq.to(tl.int64) * block_table_stride
    at = start // BLOCK_N * BLOCK_N
    block = blocks_of(table, at, start, stop, PAGE, BLOCK_N)
    whole = at
    if WINDOW == 0:
        # Tiles that every row sees whole: nearly all of a long prompt's, and without masks a quarter cheaper.
        whole = tl.maximum(0, tl.minimum(length, context + first_query + 1)) // BLOCK_N * BLOCK_N
        for at in range(0, whole, BLOCK_N):
            base = slots_of(block, at, PAGE, BLOCK_N) * (KV_HEADS * D) + kv_head * D
            block = blocks_of(table, at + BLOCK_N, start, stop, PAGE, BLOCK_N)
            k = tl.load(k_ptr + base[None, :] + dim[:, None], mask=(dim < D)[:, None], other=0.0)
            scores = tl.dot(q, k.to(q.dtype), input_precision="ieee") * score_scale
            if SOFTCAP:
                scores = capped(scores, cap)
            new_highest = tl.maximum(highest, tl.max(scores, 1))
            weights = tl.math.exp2(scores - new_highest[:, None])
            decay = tl.math.exp2(highest - new_highest)
            v = tl.load(v_ptr + base[:, None] + dim[None, :], mask=(dim < D)[None, :], other=0.0)
            weighted = tl.dot(weights.to(q.dtype), v.to(q.dtype), weighted * decay[:, None], input_precision="ieee")
            total = total * decay + tl.sum(weights, 1)
            highest = new_highest
    for at in range(whole, stop, BLOCK_N):
        key = at + tl.arange(0, BLOCK_N)
        key_live = (key >= start) & (key < stop)
        base = slots_of(block, at, PAGE, BLOCK_N) * (KV_HEADS * D) + kv_head * D
        block = blocks_of(table, at + BLOCK_N, start, stop, PAGE, BLOCK_N)
        k = tl.load(k_ptr + base[None, :] + dim[:, None], mask=key_live[None, :] & (dim < D)[:, None], other=0.0)
        scores = tl.dot(q, k.to(q.dtype), input_precision="ieee") * score_scale
        if SOFTCAP:
            scores = capped(scores, cap)
        visible = (key[None, :] <= position[:, None]) & key_live[None, :]
        if WINDOW > 0:
            visible = visible & (position[:, None] - key[None, :] < WINDOW)
        scores = tl.where(visible, scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        shift = tl.where(new_highest == float("-inf"), 0.0, new_highest)  # a row that has seen nothing yet
        weights = tl.math.exp2(scores - shift[:, None])
        decay = tl.math.exp2(highest - shift)
        v = tl.load(v_ptr + base[:, None] + dim[None, :], mask=key_live[:, None] & (dim < D)[None, :], other=0.0)
        weighted = tl.dot(weights.to(q.dtype), v.to(q.dtype), weighted * decay[:, None], input_precision="ieee")
        total = total * decay + tl.sum(weights, 1)
        highest = new_highest

    weighted *= scale_of(v_scale, V_SCALE_IN_MEMORY)
    result = weighted / tl.where(total == 0.0, 1.0, total)[:, None]  # a row without keys is zero
    tl.store(
        out_ptr + (token * OUT_STRIDE_T + head * OUT_STRIDE_H)[:, None] + dim[None, :],
        result.to(out_ptr.dtype.element_ty),
        mask=mask,
    )
