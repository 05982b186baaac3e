"""Adapters of rank 16 on a projection of Llama 3.1 8B."""

import torch
from torch import Tensor

from scalellm.kernels.aot.recorder import Case
from scalellm.kernels.dispatch import Ops

_TOKENS, _ADAPTERS, _HIDDEN = 64, 4, 4096


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _shrink(rank: int) -> Case:
    def call(ops: Ops) -> None:
        ops.lora_shrink(
            _meta(_TOKENS, _HIDDEN),
            _meta(_ADAPTERS, rank, _HIDDEN),
            _meta(_TOKENS, dtype=torch.int32),
            scaling=_meta(_ADAPTERS, dtype=torch.float32),
            out=_meta(_TOKENS, rank, dtype=torch.float32),
        )

    return Case(f"lora_shrink {rank}", call)


def _expand(rank: int) -> Case:
    def call(ops: Ops) -> None:
        ops.lora_expand(
            _meta(_TOKENS, rank, dtype=torch.float32),
            _meta(_ADAPTERS, _HIDDEN, rank),
            _meta(_TOKENS, dtype=torch.int32),
            out=_meta(_TOKENS, 6144),
            offset=0,
        )

    return Case(f"lora_expand {rank}", call)


CASES = (_shrink(16), _expand(16))
