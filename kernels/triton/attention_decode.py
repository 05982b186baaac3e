"""Attention of one query per sequence, the keys of each divided among programs ("flash decoding").

Each program attends over its share of the keys. Where a sequence has more than one, the program leaves a normalised
vector and the log2 of its weight and draws a ticket; the one with the last ticket adds them up, always in the order of
the keys, and puts the ticket back to zero for the next launch. The grid is fixed by shapes, so a captured graph serves
any lengths: programs whose share is empty leave at once, and nobody waits for them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from scalellm.kernels.launch import Launch, next_power_of_2
from scalellm.kernels.reference.quant import E4M3
from scalellm.kernels.splits import decode_tickets, decode_workspace, decode_workspace_size, least_tiles
from scalellm.kernels.triton.attention import LOG2E, as_multiplied, blocks_of, capped, slots_of
from scalellm.kernels.triton.overlap import start_after_the_kernel_before
from scalellm.kernels.triton.quantise import scale_of

_AT_ONCE = 4096  # numbers of shares that a program adds up at a time: 32 for each of 128 threads


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
    parts = tickets = None  # one split writes the result itself
    if num_splits > 1:
        needed = decode_workspace_size(num_seqs, q_heads, head_dim, num_splits)
        if workspace is None:
            workspace = decode_workspace(num_seqs, q_heads, head_dim, num_splits, q.device)
        elif workspace.numel() < needed:
            raise ValueError(f"workspace: has {workspace.numel()} elements, {needed} are needed")
        parts, tickets = workspace, decode_tickets(workspace, num_seqs, kv_heads)
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
        out,
        parts,
        tickets,
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
        PADDED_GROUP=next_power_of_2(group),
        FEW=min(next_power_of_2(num_splits), max(1, _AT_ONCE // (next_power_of_2(group) * next_power_of_2(head_dim)))),
        WINDOW=window,
        SOFTCAP=softcap > 0,
        K_SCALE_IN_MEMORY=isinstance(k_scale, Tensor),
        V_SCALE_IN_MEMORY=isinstance(v_scale, Tensor),
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
    out_ptr,
    parts_ptr,  # [S, Hq, NUM_SPLITS, D] and then [S, Hq, NUM_SPLITS], float32; with more than one split
    tickets_ptr,  # [S, Hkv] i32, zero before and after a launch
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
    PADDED_GROUP: tl.constexpr,
    FEW: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    K_SCALE_IN_MEMORY: tl.constexpr,
    V_SCALE_IN_MEMORY: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    start_after_the_kernel_before(OVERLAPS)
    seq = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    length = tl.load(seq_lens_ptr + seq)
    start, first, share = _shares(length, BLOCK_N, NUM_SPLITS, LEAST_TILES, WINDOW)
    shares = tl.maximum(tl.cdiv(length - first, share), 1)  # without keys one writes zeros
    if split >= shares:
        return
    first += split * share
    stop = tl.minimum(first + share, length)

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
    if shares == 1:
        out_at = seq * OUT_STRIDE_S + head[:, None] * OUT_STRIDE_H + dim[None, :]
        tl.store(out_ptr + out_at, part.to(out_ptr.dtype.element_ty), mask=mask)
    elif NUM_SPLITS > 1:
        weights_ptr = parts_ptr + tl.num_programs(0).to(tl.int64) * (KV_HEADS * GROUP * NUM_SPLITS * D)
        part_at = (seq * (KV_HEADS * GROUP) + head) * NUM_SPLITS + split
        tl.store(parts_ptr + part_at[:, None] * D + dim[None, :], part, mask=mask)
        tl.store(weights_ptr + part_at, highest + tl.math.log2(total), mask=row < GROUP)
        tl.debug_barrier()  # what all threads of this program wrote comes before its ticket
        ticket_ptr = tickets_ptr + seq * KV_HEADS + kv_head
        if tl.atomic_add(ticket_ptr, 1, sem="acq_rel") == shares - 1:
            tl.store(ticket_ptr, 0)
            _add_shares(
                parts_ptr,
                weights_ptr,
                out_ptr + seq * OUT_STRIDE_S + kv_head * GROUP * OUT_STRIDE_H,
                (seq * KV_HEADS + kv_head) * GROUP,
                shares,
                OUT_STRIDE_H,
                GROUP,
                D,
                PADDED_D,
                NUM_SPLITS,
                PADDED_GROUP,
                FEW,
            )


@triton.jit
def _add_shares(
    parts_ptr,
    weights_ptr,
    out_ptr,
    head,
    shares,
    OUT_STRIDE_H: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    PADDED_D: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    FEW: tl.constexpr,
):
    """Add up the shares of the `GROUP` heads from `head` on, `FEW` shares of all of them at a time."""
    WIDTH: tl.constexpr = PADDED_GROUP * PADDED_D
    wide = tl.arange(0, WIDTH)
    row, dim = wide // PADDED_D, wide % PADDED_D
    live = (row < GROUP) & (dim < D)
    highest = tl.full([WIDTH], float("-inf"), tl.float32)
    total = tl.zeros([WIDTH], tl.float32)
    result = tl.zeros([WIDTH], tl.float32)
    for begin in range(0, shares, FEW):
        split = (begin + tl.arange(0, FEW))[:, None]
        at = (head + row)[None, :] * NUM_SPLITS + split
        there = live[None, :] & (split < shares)
        # Other processors wrote them: not to be taken from this one's own cache.
        weight = tl.load(weights_ptr + at, mask=there, other=0.0, cache_modifier=".cg")
        part = tl.load(parts_ptr + at * D + dim[None, :], mask=there, other=0.0, cache_modifier=".cg")
        weight = tl.where(split < shares, weight, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(weight, 0))
        factor = tl.math.exp2(weight - new_highest[None, :])
        decay = tl.math.exp2(highest - new_highest)
        result = result * decay + tl.sum(part * factor, 0)
        total = total * decay + tl.sum(factor, 0)
        highest = new_highest
    tl.store(out_ptr + row * OUT_STRIDE_H + dim, (result / total).to(out_ptr.dtype.element_ty), mask=live)
