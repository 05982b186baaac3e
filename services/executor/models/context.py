"""What a forward pass needs beside the token ids: the flattened batch and the paged KV cache."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from services.executor.models.config import ModelConfig


class KVCache(NamedTuple):
    """Paged keys and values of one layer, each `[num_blocks, page_size, num_kv_heads, head_dim]`."""

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


def allocate_kv_caches(
    config: ModelConfig, num_blocks: int, page_size: int, *, dtype: torch.dtype, device: torch.device
) -> list[KVCache]:
    """Return one zeroed cache per layer; the memory is `num_blocks * page_size * config.kv_bytes_per_token(dtype)`."""
    shape = (num_blocks, page_size, config.num_kv_heads, config.head_dim)
    return [KVCache(_zeros(shape, dtype, device), _zeros(shape, dtype, device)) for _ in range(config.num_layers)]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # torch writes the zeros, which takes seconds per GiB; numpy asks the system for zero pages and pays when one is
    # first used, so start-up and memory cost what is used, not what is allowed.
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)
