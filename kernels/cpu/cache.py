"""How the paged cache lies in memory for the C++ forms.

Its tensors have the shape that all forms know, `[num_blocks, page_size, Hkv, D]`. Keys are strided: the tokens of a
page lie side by side, `[num_blocks, Hkv, D, page_size]`, so that scores of many tokens are vectors without shuffles.
"""

from torch import Tensor

from kernels.cpu.library import LANES


def keys_by_token(memory: Tensor) -> Tensor:
    """Return memory `[num_blocks, Hkv, D, page_size]` as a key cache `[num_blocks, page_size, Hkv, D]`."""
    return memory.permute(0, 3, 1, 2)


def can_have_layout(page_size: int, head_dim: int) -> bool:
    """Whether the C++ forms take pages and heads of these sizes: multiples of the widest vectors."""
    return page_size % LANES == 0 and head_dim % LANES == 0


def has_layout(k_cache: Tensor, v_cache: Tensor) -> bool:
    """Whether a cache lies in memory as the C++ forms read it."""
    return (
        can_have_layout(k_cache.shape[1], k_cache.shape[3])
        and v_cache.dtype == k_cache.dtype
        and v_cache.shape == k_cache.shape
        and k_cache.permute(0, 2, 3, 1).is_contiguous()
        and v_cache.is_contiguous()
    )
