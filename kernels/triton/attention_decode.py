"""Attention of one query per sequence, the keys of each divided into shares ("flash decoding").

The keys of a sequence are divided by its own length, so its sums have one order whatever is beside it. The shares of
all sequences are numbered, and the programs of a kv head take them in turn: a long sequence among short ones is read
by as many programs as if it were alone. The grid is fixed by shapes, so a captured graph serves any lengths.

Where a sequence has several shares, its programs leave normalised vectors and the log2 of their weights and draw
tickets; the one with the last ticket adds them up, always in the order of the keys, and puts the ticket back to zero
for the next launch. Nobody waits for another program.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from scalellm.kernels.launch import Launch, next_power_of_2
from scalellm.kernels.reference.quant import E4M3
from scalellm.kernels.splits import (
    decode_programs,
    decode_tickets,
    decode_workspace,
    decode_workspace_size,
    least_tiles,
)
from scalellm.kernels.triton.attention import LOG2E, as_multiplied, blocks_of, capped, slots_of
from scalellm.kernels.triton.overlap import start_after_the_kernel_before
from scalellm.kernels.triton.quantise import scale_of

_AT_ONCE = 4096  # numbers of shares that a program adds up at a time: 32 for each of 128 threads
_LENGTHS = 128  # that a program looks at together: one for each thread


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
        (decode_programs(launch.capability, num_seqs, num_splits), kv_heads),
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
        num_seqs,
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
        LEAST_TILES=least_tiles(launch.capability, block_n),
        LENGTHS=_LENGTHS,
        PADDED_GROUP=next_power_of_2(group),
        FEW=min(next_power_of_2(num_splits), max(1, _AT_ONCE // (next_power_of_2(group) * next_power_of_2(head_dim)))),
        WINDOW=window,
        SOFTCAP=softcap > 0,
        K_SCALE_IN_MEMORY=isinstance(k_scale, Tensor),
        V_SCALE_IN_MEMORY=isinstance(v_scale, Tensor),
    )
    return out


@triton.jit
def _division(length, BLOCK_N: tl.constexpr, NUM_SPLITS: tl.constexpr, LEAST_TILES: tl.constexpr, WINDOW: tl.constexpr):
    """Return the first key a query sees, the first tile it is in, the tiles of a share and the number of shares.

    A share has one tile more than `LEAST_TILES` for every `NUM_SPLITS` tiles, so there are never more than NUM_SPLITS.
    A sequence without keys has one, which writes zeros.
    """
    start = 0
    if WINDOW > 0:
        start = tl.maximum(0, length - WINDOW)
    first_tile = start // BLOCK_N
    tiles = tl.cdiv(length, BLOCK_N) - first_tile
    share = LEAST_TILES + tiles // NUM_SPLITS
    return start, first_tile, share, tl.maximum(tl.cdiv(tiles, share), 1)


@triton.jit
def _numbers_of_shares(
    seq_lens_ptr,
    begin,
    num_seqs,
    LENGTHS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    LEAST_TILES: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Return how many shares each of the sequences from `begin` on has; beyond the last one, 0."""
    seq = begin + tl.arange(0, LENGTHS)
    length = tl.load(seq_lens_ptr + seq, mask=seq < num_seqs, other=0)
    _, _, _, shares = _division(length, BLOCK_N, NUM_SPLITS, LEAST_TILES, WINDOW)
    return tl.where(seq < num_seqs, shares, 0)


@triton.jit
def _share_of(
    number,
    seq_lens_ptr,
    num_seqs,
    LENGTHS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    LEAST_TILES: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Return the sequence that a share with this number is of, and which of its shares it is."""
    seq = 0
    first = 0  # number of the sequence's first share
    before = 0
    for begin in range(0, num_seqs, LENGTHS):
        shares = _numbers_of_shares(seq_lens_ptr, begin, num_seqs, LENGTHS, BLOCK_N, NUM_SPLITS, LEAST_TILES, WINDOW)
        ends = before + tl.cumsum(shares)
        seq += tl.sum((ends <= number).to(tl.int32))
        first = tl.maximum(first, tl.max(tl.where(ends <= number, ends, 0)))
        before += tl.sum(shares)
    return seq.to(tl.int64), number - first


@triton.jit(do_not_specialize=["num_seqs", "block_table_stride"])
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
    num_seqs,
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
    LENGTHS: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    FEW: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    K_SCALE_IN_MEMORY: tl.constexpr,
    V_SCALE_IN_MEMORY: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    start_after_the_kernel_before(OVERLAPS)
    kv_head = tl.program_id(1)
    score_scale *= scale_of(k_scale, K_SCALE_IN_MEMORY)
    row = tl.arange(0, BLOCK_H)
    dim = tl.arange(0, PADDED_D)
    head = kv_head * GROUP + row
    mask = (row < GROUP)[:, None] & (dim < D)[None, :]

    total_shares = 0
    for begin in range(0, num_seqs, LENGTHS):
        some = _numbers_of_shares(seq_lens_ptr, begin, num_seqs, LENGTHS, BLOCK_N, NUM_SPLITS, LEAST_TILES, WINDOW)
        total_shares += tl.sum(some)
    # What is the same for all shares is computed anew for each, and what adds them up is a call: kept in registers
    # all the time, both take 60 of them, and only two programs fit into a processor with shared memory for three.
    for number in tl.range(tl.program_id(0), total_shares, tl.num_programs(0), disable_licm=True):
        seq, split = _share_of(number, seq_lens_ptr, num_seqs, LENGTHS, BLOCK_N, NUM_SPLITS, LEAST_TILES, WINDOW)
        length = tl.load(seq_lens_ptr + seq)
        start, first_tile, tiles, shares = _division(length, BLOCK_N, NUM_SPLITS, LEAST_TILES, WINDOW)
        first = (first_tile + split * tiles) * BLOCK_N
        stop = tl.minimum(first + tiles * BLOCK_N, length)
        q = tl.load(q_ptr + seq * Q_STRIDE_S + head[:, None] * Q_STRIDE_H + dim[None, :], mask=mask, other=0.0)
        q = as_multiplied(q, k_ptr.dtype.element_ty)

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
            weights_ptr = parts_ptr + num_seqs.to(tl.int64) * (KV_HEADS * GROUP * NUM_SPLITS * D)
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


@triton.jit(noinline=True)
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
