"""The layout of the paged cache in memory for the C++ forms.

Its tensors have the shape of all forms, `[num_blocks, page_size, Hkv, D]`. Keys are strided: in memory the tokens of a
page are adjacent, `[num_blocks, Hkv, D, page_size]`, so that the scores of many tokens are vectors without shuffles.

8-bit caches are bytes that only the C++ forms read, in the layout of `cache8.h`: `[num_blocks, page_size / 16, Hkv,
D + 4, 16]`, in parts of 16 tokens with their scales.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from scalellm.kernels.cpu.library import LANES
from scalellm.kernels.reference.cache import SCALE_BYTES, head_dim_of

CACHE_OPS = ("paged_attention_decode", "qk_norm_rope_and_cache", "unified_attention")
_PART = 16  # `kPart` in cache8.h
MAX_HEAD_DIM = 256  # for which there is room in C++ where a head is rotated and written


class CacheSizes(NamedTuple):
    """The capacity of a cache."""

    num_blocks: int
    page_size: int
    kv_heads: int
    head_dim: int


def cache_sizes(cache: Tensor) -> CacheSizes:
    """Return the sizes of a cache in either layout."""
    if cache.dim() == 5:
        num_blocks, parts, kv_heads, row, _ = cache.shape
        return CacheSizes(num_blocks, parts * _PART, kv_heads, row - SCALE_BYTES)
    num_blocks, page_size, kv_heads, _ = cache.shape
    return CacheSizes(num_blocks, page_size, kv_heads, head_dim_of(cache))


def bytes_shape(num_blocks: int, page_size: int, kv_heads: int, head_dim: int) -> tuple[int, ...]:
    """Return the shape of a cache of 8 bits as the C++ forms read it."""
    return num_blocks, page_size // _PART, kv_heads, head_dim + SCALE_BYTES, _PART


def keys_by_token(memory: Tensor) -> Tensor:
    """Return memory `[num_blocks, Hkv, D, page_size]` as a key cache `[num_blocks, page_size, Hkv, D]`."""
    return memory.permute(0, 3, 1, 2)


def can_have_bytes(page_size: int, head_dim: int) -> bool:
    """True if the C++ forms support 8-bit caches with pages and heads of these sizes."""
    return page_size % _PART == 0 and head_dim % (2 * LANES) == 0 and head_dim <= MAX_HEAD_DIM


def require_rows(*caches: Tensor) -> None:
    """Raise ValueError for an 8-bit cache, which only the C++ forms can read."""
    if any(cache.dim() == 5 for cache in caches):
        raise ValueError("the cache lies in bytes for the C++ forms, which do not take these arguments")


def can_have_layout(page_size: int, head_dim: int) -> bool:
    """True if the C++ forms support pages and heads of these sizes, which must be multiples of the widest vectors."""
    return page_size % LANES == 0 and head_dim % LANES == 0


def has_layout(k_cache: Tensor, v_cache: Tensor) -> bool:
    """True if a cache has the memory layout of the C++ forms."""
    sizes = cache_sizes(k_cache)
    if not (
        can_have_layout(sizes.page_size, sizes.head_dim)
        and v_cache.dtype == k_cache.dtype
        and v_cache.shape == k_cache.shape
        and v_cache.is_contiguous()
    ):
        return False
    if k_cache.dtype == torch.int8:
        return k_cache.dim() == 5 and k_cache.is_contiguous()
    return k_cache.permute(0, 2, 3, 1).is_contiguous()
