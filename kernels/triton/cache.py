"""Copies of whole cache blocks."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from scalellm.kernels.launch import Launch
from scalellm.kernels.reference import cache as reference

# One program holds its words of all pairs in registers, so that every source is read before anything is written: this
# many pairs of 64 bytes are 64 registers of a thread, for K and V together.
_MOST_PAIRS = 256
_FEW_PAIRS = 16


def copy_blocks_(launch: Launch, k_cache: Tensor, v_cache: Tensor, pairs: Tensor) -> None:
    """See the torch form. More than 256 pairs take that form, which allocates."""
    count = pairs.shape[0]
    if count > _MOST_PAIRS:
        reference.copy_blocks_(k_cache, v_cache, pairs)
        return
    k, v = k_cache.view(torch.int64), v_cache.view(torch.int64)
    block_words = k.stride(0)
    # Two sizes, so that warm-up can reach both. Words are int64, so that an aligned two of them are one instruction.
    slots, words = (_FEW_PAIRS, 32) if count <= _FEW_PAIRS else (_MOST_PAIRS, 8)
    grid = (triton.cdiv(block_words, words) if count else 0,)
    launch(_copy_blocks, grid, k, v, pairs, count, BLOCK_WORDS=block_words, PAIRS=slots, WORDS=words)


@triton.jit(do_not_specialize=["num_pairs"])
def _copy_blocks(
    k_ptr,
    v_ptr,
    pairs_ptr,  # [num_pairs, 2]
    num_pairs,
    BLOCK_WORDS: tl.constexpr,
    PAIRS: tl.constexpr,
    WORDS: tl.constexpr,
):
    pair = tl.arange(0, PAIRS)
    word = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    live = pair < num_pairs
    source = tl.load(pairs_ptr + pair * 2, mask=live, other=0).to(tl.int64)
    destination = tl.load(pairs_ptr + pair * 2 + 1, mask=live, other=0).to(tl.int64)
    mask = live[:, None] & (word < BLOCK_WORDS)[None, :]
    read = source[:, None] * BLOCK_WORDS + word[None, :]
    write = destination[:, None] * BLOCK_WORDS + word[None, :]
    k = tl.load(k_ptr + read, mask=mask)
    v = tl.load(v_ptr + read, mask=mask)
    tl.debug_barrier()  # what one thread overwrites, another may be reading
    tl.store(k_ptr + write, k, mask=mask)
    tl.store(v_ptr + write, v, mask=mask)
