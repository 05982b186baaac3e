"""Attention of one query per sequence, the keys of each divided among programs ("flash decoding").

Each program attends over its share of the keys and leaves a normalised vector and the log2 of its weight; a second
kernel adds them up. The grid is fixed by shapes, so a captured graph serves any lengths: programs whose share is empty
leave at once, and the second kernel does not read what they did not write.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from scalellm.kernels.launch import Launch, next_power_of_2
from scalellm.kernels.reference.quant import E4M3
from scalellm.kernels.splits import decode_workspace, least_tiles
from scalellm.kernels.triton.attention import LOG2E, as_multiplied, blocks_of, capped, slots_of
from scalellm.kernels.triton.quantise import scale_of


def paged_attention_decode(
    launch: Launch,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    scale: float,
    num_splits: int = 1,
    window: int = 0,
    softcap: float = 0.0,
    k_scale: float | Tensor | None = None,
    v_scale: float | Tensor | None = None,
    workspace: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """See the torch form; `kernels.splits` gives `num_splits` and `workspace`, which one split does not need."""
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise ValueError("k_cache, v_cache: must be contiguous")
    if k_cache.dtype == E4M3:
        launch.capability.require_e4m3("k_cache, v_cache")
    out = torch.empty_like(q) if out is None else out
    num_seqs, q_heads, head_dim = q.shape
    page, kv_heads = k_cache.shape[1:3]
    group = q_heads // kv_heads
    tile = launch.tile("paged_attention_decode", element_size=q.element_size(), head_dim=head_dim)
    block_n = tile["block_n"]
    least = least_tiles(launch.capability, num_splits, block_n)
    parts = out  # one split writes the result itself
    if num_splits > 1:
        size = num_seqs * q_heads * num_splits
        if workspace is None:
            workspace = decode_workspace(num_seqs, q_heads, head_dim, num_splits, q.device)
        elif workspace.numel() < size * (head_dim + 1):
            raise ValueError(f"workspace: has {workspace.numel()} elements, {size * (head_dim + 1)} are needed")
        parts = workspace
    launch(
        _decode_split,
        (num_seqs, kv_heads, num_splits),
        q,
        k_cache,
        v_cache,
        block_table,
        seq_lens,
        1.0 if k_scale is None else k_scale,
        1.0 if v_scale is None else v_scale,
        parts,
        block_table.stride(0),
        scale / softcap if softcap else scale * LOG2E,
        softcap * LOG2E,
        num_warps=tile["num_warps"],
        num_stages=tile["num_stages"],
        Q_STRIDE_S=q.stride(0),
        Q_STRIDE_H=q.stride(1),
        OUT_STRIDE_S=out.stride(0),
        OUT_STRIDE_H=out.stride(1),
        KV_HEADS=kv_heads,
        GROUP=group,
        D=head_dim,
        PADDED_D=next_power_of_2(head_dim),
        PAGE=page,
        BLOCK_H=max(16, next_power_of_2(group)),
        BLOCK_N=block_n,
        NUM_SPLITS=num_splits,
        LEAST_TILES=least,
        WINDOW=window,
        SOFTCAP=softcap > 0,
        K_SCALE_IN_MEMORY=isinstance(k_scale, Tensor),
        V_SCALE_IN_MEMORY=isinstance(v_scale, Tensor),
    )
    if num_splits > 1:
        launch(
            _decode_reduce,
            (num_seqs, q_heads),
            parts,
            seq_lens,
            out,
            num_warps=1 if num_splits * head_dim <= 2048 else 4,
            num_stages=1,
            OUT_STRIDE_S=out.stride(0),
            OUT_STRIDE_H=out.stride(1),
            Q_HEADS=q_heads,
            D=head_dim,
            PADDED_D=next_power_of_2(head_dim),
            BLOCK_N=block_n,
            NUM_SPLITS=num_splits,
            PADDED_SPLITS=next_power_of_2(num_splits),
            LEAST_TILES=least,
            WINDOW=window,
        )
    return out


@triton.jit
def _shares(length, BLOCK_N: tl.constexpr, NUM_SPLITS: tl.constexpr, LEAST_TILES: tl.constexpr, WINDOW: tl.constexpr):
    """Return the first key a query sees, the tile it is in, and the keys of a share, a multiple of the tile."""
    start = 0
    if WINDOW > 0:
        start = tl.maximum(0, length - WINDOW)
    first_tile = start // BLOCK_N
    tiles = tl.maximum(tl.cdiv(tl.cdiv(length, BLOCK_N) - first_tile, NUM_SPLITS), LEAST_TILES)
    return start, first_tile * BLOCK_N, tiles * BLOCK_N


@triton.jit(do_not_specialize=["block_table_stride"])
def _decode_split(
    q_ptr,
    k_ptr,
    v_ptr,
    block_table_ptr,
    seq_lens_ptr,
    k_scale,
    v_scale,
    parts_ptr,  # [S, Hq, NUM_SPLITS, D] and then [S, Hq, NUM_SPLITS], float32; the result when there is one split
    block_table_stride,
    score_scale,  # of q.k: gives powers of two, or with SOFTCAP the argument of tanh
    cap,  # times log2(e)
    Q_STRIDE_S: tl.constexpr,
    Q_STRIDE_H: tl.constexpr,
    OUT_STRIDE_S: tl.constexpr,
    OUT_STRIDE_H: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    PADDED_D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    LEAST_TILES: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    K_SCALE_IN_MEMORY: tl.constexpr,
    V_SCALE_IN_MEMORY: tl.constexpr,
):
    seq = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    length = tl.load(seq_lens_ptr + seq)
    start, first, share = _shares(length, BLOCK_N, NUM_SPLITS, LEAST_TILES, WINDOW)
    first += split * share
    stop = tl.minimum(first + share, length)
    if NUM_SPLITS > 1 and first >= stop:
        return

    row = tl.arange(0, BLOCK_H)
    dim = tl.arange(0, PADDED_D)
    head = kv_head * GROUP + row
    mask = (row < GROUP)[:, None] & (dim < D)[None, :]
    q = tl.load(q_ptr + seq * Q_STRIDE_S + head[:, None] * Q_STRIDE_H + dim[None, :], mask=mask, other=0.0)
    q = as_multiplied(q, k_ptr.dtype.element_ty)
    score_scale *= scale_of(k_scale, K_SCALE_IN_MEMORY)

    highest = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    weighted = tl.zeros([BLOCK_H, PADDED_D], tl.float32)
    table = block_table_ptr + seq * block_table_stride
    block = blocks_of(table, first, start, stop, PAGE, BLOCK_N)
    for at in range(first, stop, BLOCK_N):
        key = at + tl.arange(0, BLOCK_N)
        live = (key >= start) & (key < stop)  # one at least: each tile gives every row a finite maximum
        base = slots_of(block, at, PAGE, BLOCK_N) * (KV_HEADS * D) + kv_head * D
        block = blocks_of(table, at + BLOCK_N, start, stop, PAGE, BLOCK_N)
        k = tl.load(k_ptr + base[None, :] + dim[:, None], mask=live[None, :] & (dim < D)[:, None], other=0.0)
        scores = tl.dot(q, k.to(q.dtype), input_precision="ieee") * score_scale
        if SOFTCAP:
            scores = capped(scores, cap)
        scores = tl.where(live[None, :], scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.math.exp2(scores - new_highest[:, None])
        decay = tl.math.exp2(highest - new_highest)
        v = tl.load(v_ptr + base[:, None] + dim[None, :], mask=live[:, None] & (dim < D)[None, :], other=0.0)
        weighted = tl.dot(weights.to(q.dtype), v.to(q.dtype), weighted * decay[:, None], input_precision="ieee")
        total = total * decay + tl.sum(weights, 1)
        highest = new_highest

    weighted *= scale_of(v_scale, V_SCALE_IN_MEMORY)
    part = weighted / tl.where(total == 0.0, 1.0, total)[:, None]  # a row without keys is zero
    if NUM_SPLITS == 1:
        at = seq * OUT_STRIDE_S + head[:, None] * OUT_STRIDE_H + dim[None, :]
        tl.store(parts_ptr + at, part.to(parts_ptr.dtype.element_ty), mask=mask)
    else:
        at = (seq * (KV_HEADS * GROUP) + head) * NUM_SPLITS + split
        tl.store(parts_ptr + at[:, None] * D + dim[None, :], part, mask=mask)
        weights_ptr = parts_ptr + tl.num_programs(0).to(tl.int64) * (KV_HEADS * GROUP * NUM_SPLITS * D)
        tl.store(weights_ptr + at, highest + tl.math.log2(total), mask=row < GROUP)


@triton.jit
def _decode_reduce(
    parts_ptr,
    seq_lens_ptr,
    out_ptr,
    OUT_STRIDE_S: tl.constexpr,
    OUT_STRIDE_H: tl.constexpr,
    Q_HEADS: tl.constexpr,
    D: tl.constexpr,
    PADDED_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    PADDED_SPLITS: tl.constexpr,
    LEAST_TILES: tl.constexpr,
    WINDOW: tl.constexpr,
):
    seq = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    length = tl.load(seq_lens_ptr + seq)
    _, first, share = _shares(length, BLOCK_N, NUM_SPLITS, LEAST_TILES, WINDOW)
    split = tl.arange(0, PADDED_SPLITS)
    dim = tl.arange(0, PADDED_D)
    written = (split < NUM_SPLITS) & (first + split * share < length)
    at = (seq * Q_HEADS + head) * NUM_SPLITS + split
    weights_ptr = parts_ptr + tl.num_programs(0).to(tl.int64) * (Q_HEADS * NUM_SPLITS * D)
    weight = tl.load(weights_ptr + at, mask=written, other=float("-inf"))
    part = tl.load(parts_ptr + at[:, None] * D + dim[None, :], mask=written[:, None] & (dim < D)[None, :], other=0.0)
    highest = tl.max(weight, 0)
    factor = tl.where(written, tl.math.exp2(weight - tl.where(length > 0, highest, 0.0)), 0.0)
    total = tl.sum(factor, 0)
    result = tl.sum(part * factor[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    at_out = seq * OUT_STRIDE_S + head * OUT_STRIDE_H + dim
    tl.store(out_ptr + at_out, result.to(out_ptr.dtype.element_ty), mask=dim < D)
