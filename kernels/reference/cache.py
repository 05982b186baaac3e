"""The values of a cache of 8 bits, and copies of whole cache blocks."""

import torch
from torch import Tensor

SCALE_BYTES = 4  # of the scale behind a row of 8-bit codes


def head_dim_of(cache: Tensor) -> int:
    """Return D of a cache `[num_blocks, page_size, Hkv, D]`; rows of an int8 one are D codes and a float32 scale."""
    return cache.shape[-1] - (SCALE_BYTES if cache.dtype == torch.int8 else 0)


def to_int8_rows(values: Tensor) -> Tensor:
    """Return rows `[..., D]` as `[..., D + 4]` int8: codes of -127 .. 127, and the bytes of their scale."""
    values = values.float()
    scale = values.abs().amax(-1, keepdim=True) / 127
    codes = torch.where(scale > 0, values / scale, 0.0).round().to(torch.int8)
    return torch.cat((codes, scale.view(torch.int8)), dim=-1)


def from_int8_rows(rows: Tensor) -> Tensor:
    """Return what `to_int8_rows` made its rows of, `[..., D]` float32."""
    codes, scale = rows[..., :-SCALE_BYTES], rows[..., -SCALE_BYTES:].contiguous().view(torch.float32)
    return codes.float() * scale


def copy_blocks_(k_cache: Tensor, v_cache: Tensor, pairs: Tensor) -> None:
    """Copy blocks inside one layer's cache, in place (copy-on-write after a fork).

    Args:
        k_cache: [num_blocks, page_size, Hkv, D]; `v_cache` alike.
        v_cache: see `k_cache`.
        pairs: [N, 2] i64 of (source, destination). All sources are read before any destination is written.
            Destinations must be distinct.
    """
    source, destination = pairs.unbind(1)
    for cache in (k_cache, v_cache):
        _copy(cache, cache, source, destination)


def swap_blocks(src: Tensor, dst: Tensor, pairs: Tensor, stream: torch.Stream | None = None) -> None:
    """Copy blocks `pairs[:, 0]` of `src` over blocks `pairs[:, 1]` of `dst`: another cache, possibly on another device.

    `src` and `dst` are [num_blocks, ...] with equal trailing shapes and dtype; `pairs` is [N, 2] i64 with distinct
    destinations. `stream` is where a device copy would be queued; this form copies before it returns and raises
    ValueError when given one.
    """
    if stream is not None:
        raise ValueError("stream: the torch form of swap_blocks copies synchronously and takes none")
    source, destination = pairs.unbind(1)
    _copy(src, dst, source.to(src.device), destination.to(dst.device))


def block_bytes(cache: Tensor) -> Tensor:
    """Return a cache `[num_blocks, ...]` as `[num_blocks, bytes of a block]`, however a block's numbers lie."""
    return cache.as_strided((cache.shape[0], cache.stride(0)), (cache.stride(0), 1)).view(torch.uint8)


def _copy(src: Tensor, dst: Tensor, source: Tensor, destination: Tensor) -> None:
    # As bytes, so that every cache dtype takes the same path. index_select makes the temporary that orders reads first.
    block_bytes(dst).index_copy_(0, destination, block_bytes(src).index_select(0, source).to(dst.device))
