"""Routing of a mixture of experts: the experts of each token, and the layout of tokens by expert in whole blocks."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from scalellm.kernels.launch import Launch
from scalellm.kernels.workspaces import ceil_div, moe_chunk, moe_layout_sizes


@triton.jit
def _topk_softmax(
    logits,
    weights,
    ids,
    K: tl.constexpr,
    EXPERTS: tl.constexpr,
    STRIDE: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    experts, choices = tl.arange(0, BLOCK), tl.arange(0, BLOCK_K)
    x = tl.load(logits + row * STRIDE + experts, mask=experts < EXPERTS, other=float("-inf")).to(tl.float32)
    exp = tl.exp(x - tl.max(x, axis=0))
    probs = tl.where(experts < EXPERTS, exp / tl.sum(exp, axis=0), -1.0)
    best = tl.zeros([BLOCK_K], tl.float32)
    chosen = tl.zeros([BLOCK_K], tl.int32)
    for i in tl.static_range(K):
        largest = tl.max(probs, axis=0)
        expert = tl.min(tl.where(probs == largest, experts, BLOCK), axis=0)
        best = tl.where(choices == i, largest, best)
        chosen = tl.where(choices == i, expert, chosen)
        probs = tl.where(experts == expert, -1.0, probs)
    if RENORMALIZE:
        best = best / tl.sum(best, axis=0)
    tl.store(weights + row * K + choices, best, mask=choices < K)
    tl.store(ids + row * K + choices, chosen, mask=choices < K)


def topk_softmax(
    launch: Launch, router_logits: Tensor, k: int, renormalize: bool, *, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """One program per token."""
    tokens, experts = router_logits.shape
    if out is None:
        device = router_logits.device
        out = (
            torch.empty((tokens, k), dtype=torch.float32, device=device),
            torch.empty((tokens, k), dtype=torch.int32, device=device),
        )
    launch(
        _topk_softmax,
        (tokens,),
        router_logits,
        *out,
        num_warps=1,
        K=k,
        EXPERTS=experts,
        STRIDE=router_logits.stride(0),
        RENORMALIZE=renormalize,
        BLOCK=triton.next_power_of_2(experts),
        BLOCK_K=triton.next_power_of_2(k),
    )
    return out


@triton.jit
def _one_hot(ids, pairs, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """Return, for the program's chunk of pairs, their numbers and an i32 matrix with a 1 at each one's expert."""
    pair = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    expert = tl.load(ids + pair, mask=pair < pairs, other=-1)
    return pair, (expert[:, None] == tl.arange(0, BLOCK)[None, :]).to(tl.int32)


@triton.jit(do_not_specialize=["pairs", "size"])
def _count_experts(
    ids, counts, sorted_token_ids, pairs, size, BLOCK: tl.constexpr, CHUNK: tl.constexpr, FILL: tl.constexpr
):
    """Count each expert in each chunk of pairs, and fill the layout with padding."""
    _, hot = _one_hot(ids, pairs, CHUNK, BLOCK)
    tl.store(counts + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.sum(hot, axis=0))
    for start in range(tl.program_id(0) * FILL, size, tl.num_programs(0) * FILL):
        at = start + tl.arange(0, FILL)
        tl.store(sorted_token_ids + at, tl.zeros([FILL], tl.int32) + pairs, mask=at < size)


@triton.jit(do_not_specialize=["pairs", "chunks", "num_blocks"])
def _place_pairs(
    ids,
    counts,
    sorted_token_ids,
    expert_ids,
    num_tokens_post_pad,
    pairs,
    chunks,
    num_blocks,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    chunk = tl.program_id(0)
    experts = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.int32)
    before = tl.zeros([BLOCK], tl.int32)
    for i in range(chunks):
        count = tl.load(counts + i * BLOCK + experts)
        before += tl.where(i < chunk, count, 0)
        total += count
    blocks = (total + BLOCK_SIZE - 1) // BLOCK_SIZE
    ends = tl.cumsum(blocks, axis=0)
    first = (ends - blocks) * BLOCK_SIZE + before
    pair, hot = _one_hot(ids, pairs, CHUNK, BLOCK)
    rank = tl.cumsum(hot, axis=0) - 1
    at = tl.sum(hot * (rank + first[None, :]), axis=1)
    tl.store(sorted_token_ids + at, pair, mask=pair < pairs)
    used = tl.sum(blocks, axis=0)
    for start in range(chunk * CHUNK, num_blocks, chunks * CHUNK):
        block = start + tl.arange(0, CHUNK)
        expert = tl.sum((block[:, None] >= ends[None, :]).to(tl.int32), axis=1)
        tl.store(expert_ids + block, tl.where(block < used, expert, -1), mask=block < num_blocks)
    if chunk == 0:
        tl.store(num_tokens_post_pad, used * BLOCK_SIZE)


def moe_align_block_size(
    launch: Launch,
    ids: Tensor,
    block_size: int,
    num_experts: int,
    *,
    workspace: Tensor | None = None,
    out: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Two launches: counts of each chunk of pairs, then each pair's place from the counts before its chunk."""
    pairs = ids.numel()
    size, num_blocks, num_counts = moe_layout_sizes(pairs, block_size, num_experts)
    if out is None:
        # Each begins at 16 bytes whatever the number of pairs: it decides which variant of the kernels is compiled.
        middle, end = ceil_div(size, 4) * 4, ceil_div(num_blocks, 4) * 4
        new = torch.empty(middle + end + 1, dtype=torch.int32, device=ids.device)
        out = new[:size], new[middle : middle + num_blocks], new[-1:]
    if workspace is None:
        workspace = torch.empty(num_counts, dtype=torch.int32, device=ids.device)
    chunk, block = moe_chunk(num_experts)
    chunks = num_counts // block
    launch(_count_experts, (chunks,), ids, workspace, out[0], pairs, size, BLOCK=block, CHUNK=chunk, FILL=512)
    launch(
        _place_pairs,
        (chunks,),
        ids,
        workspace,
        *out,
        pairs,
        chunks,
        num_blocks,
        BLOCK_SIZE=block_size,
        BLOCK=block,
        CHUNK=chunk,
    )
    return out
