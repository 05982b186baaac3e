"""How the keys of a decode batch are divided among the processors of a device."""

import torch
from torch import Tensor

from kernels.launch import Capability

_FEWEST, _MOST = 4, 64
_PROGRAMS_PER_SM = 4  # enough loads in flight to keep memory busy, and small enough shares to even out


def num_decode_splits(capability: Capability, num_seqs: int, num_kv_heads: int) -> int:
    """Return `num_splits` for `paged_attention_decode`: a power of two, 4 to 64.

    Chosen from shapes alone, so that it is the same whenever a captured graph runs and a sequence's result does not
    depend on how long its neighbours are. Never fewer than 4: a single long sequence in a large batch would otherwise
    be read by one processor per head while the others wait. A share without keys costs next to nothing.
    """
    wanted = _PROGRAMS_PER_SM * capability.num_sms / max(1, num_seqs * num_kv_heads)
    splits = _FEWEST
    while splits < wanted and splits < _MOST:
        splits *= 2
    return splits


def decode_workspace(
    num_seqs: int, num_heads: int, head_dim: int, num_splits: int, device: torch.device | None = None
) -> Tensor:
    """Allocate the scratch of `paged_attention_decode` for at most these sizes: per share a vector and its weight."""
    return torch.empty(num_seqs * num_heads * num_splits * (head_dim + 1), dtype=torch.float32, device=device)
