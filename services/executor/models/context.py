"""The inputs of a forward pass beside the token ids: the flattened batch and the paged KV cache."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from scalellm.kernels import Ops
from scalellm.kernels.cpu.cache import CACHE_OPS, bytes_shape, can_have_bytes, can_have_layout, keys_by_token
from scalellm.kernels.reference.cache import SCALE_BYTES
from scalellm.services.executor.model_config.config import ModelConfig
from scalellm.services.executor.models.weight_memory import zero_pages


class KVCache(NamedTuple):
    """Paged keys and values of one layer, each `[num_blocks, page_size, num_kv_heads, head_dim]`.

    Of int8 with a scale behind each row, `head_dim + 4`, or as the C++ forms read them (`kernels.cpu.cache`).
    """

    k: Tensor
    v: Tensor


@dataclass(frozen=True)
class DecodeRows:
    """The sequences of a batch with one new token each.

    seq_lens `[D]` i32, length including the new token, 0 for a row of padding; block_table `[D, max_blocks]` i32;
    num_splits and workspace as `kernels.paged_attention_decode` takes them.
    """

    seq_lens: Tensor
    block_table: Tensor
    num_splits: int = 1
    workspace: Tensor | None = None


@dataclass(frozen=True)
class PrefillRows:
    """The P sequences of a batch with chunks of several new tokens.

    cu_seqlens_q `[P + 1]` i32, where the new tokens of each start, from 0; seq_lens `[P]` i32, length including the
    new tokens; block_table `[P, max_blocks]` i32; max_seqlen_q, the longest chunk.
    """

    cu_seqlens_q: Tensor
    seq_lens: Tensor
    block_table: Tensor
    max_seqlen_q: int


@dataclass(frozen=True)
class ForwardContext:
    """A batch whose T new tokens are laid end to end: one for each of the decoding sequences, then the chunks.

    positions `[T]` i64 in their sequence; slot_mapping `[T]` i64, cache slot to write (`block * page_size + offset`),
    -1 writes nothing; decode and prefill say whose tokens they are, None where there are none of the kind.
    """

    positions: Tensor
    slot_mapping: Tensor
    decode: DecodeRows | None
    prefill: PrefillRows | None


def kv_bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """Return the bytes of KV cache one token takes over all layers."""
    row = config.head_dim * dtype.itemsize + (SCALE_BYTES if dtype == torch.int8 else 0)
    return 2 * config.num_layers * config.num_kv_heads * row


def allocate_kv_caches(
    config: ModelConfig,
    num_blocks: int,
    page_size: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    ops: Ops | None = None,
) -> list[KVCache]:
    """Return one zeroed cache per layer; the memory is `num_blocks * page_size * kv_bytes_per_token(config, dtype)`.

    Keys lie as the C++ forms read them where `ops` has these (`kernels.cpu.cache`), else token by token.
    """
    heads, head_dim = config.num_kv_heads, config.head_dim
    if dtype == torch.int8:
        shape = _shape_of_bytes((num_blocks, page_size, heads, head_dim), ops)
        return [KVCache(*(_zeros(shape, dtype, device) for _ in range(2))) for _ in range(config.num_layers)]
    for_cpp = ops is not None and ops.library is not None and can_have_layout(page_size, head_dim)

    def values() -> Tensor:
        return _zeros((num_blocks, page_size, heads, head_dim), dtype, device)

    def keys() -> Tensor:
        return keys_by_token(_zeros((num_blocks, heads, head_dim, page_size), dtype, device)) if for_cpp else values()

    return [KVCache(keys(), values()) for _ in range(config.num_layers)]


def _shape_of_bytes(rows: tuple[int, int, int, int], ops: Ops | None) -> tuple[int, ...]:
    """Return the shape in which rows `[num_blocks, page_size, num_kv_heads, head_dim]` have 8 bits and a scale."""
    num_blocks, page_size, heads, head_dim = rows
    # Forms of torch cannot read what those in C++ do, so it is all of them or none.
    is_for_cpp = ops is not None and all(ops.backends[name] == "cpp" for name in CACHE_OPS)
    if is_for_cpp and can_have_bytes(page_size, head_dim):
        return bytes_shape(*rows)
    return num_blocks, page_size, heads, head_dim + SCALE_BYTES


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # torch would write the zeros, which takes seconds per GiB: start-up and memory cost what is used, not allowed.
    return zero_pages(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)
