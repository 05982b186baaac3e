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
class ForwardContext:
    """A batch of S sequences whose T new tokens are laid end to end, prefill chunks and decode steps alike.

    positions `[T]` i64 in their sequence; slot_mapping `[T]` i64, cache slot to write (`block * page_size + offset`),
    -1 writes nothing; cu_seqlens_q `[S + 1]` i32, where each sequence's new tokens start; seq_lens `[S]` i32, length
    including the new tokens; block_table `[S, max_blocks]` i32; max_seqlen_q, the longest run of new tokens.
    """

    positions: Tensor
    slot_mapping: Tensor
    cu_seqlens_q: Tensor
    seq_lens: Tensor
    block_table: Tensor
    max_seqlen_q: int


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
