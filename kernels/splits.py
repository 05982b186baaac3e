"""The division of a decode batch's keys among the processors of a device."""

import torch
from torch import Tensor

from scalellm.kernels.capability import Capability
from scalellm.kernels.tiles import tile_table

_ALIGNED = 4  # elements of 4 bytes in 16 bytes


def num_decode_splits(capability: Capability, num_seqs: int, num_kv_heads: int) -> int:
    """Return `num_splits` for `paged_attention_decode`: a power of two, 8 to 64 in the tables.

    As many as give each processor a few programs: enough loads in flight to keep memory busy, and shares small enough
    to even out. Chosen from shapes alone, so that it is the same whenever a captured graph runs and a sequence's result
    does not depend on how long its neighbours are. Never fewer than the table's `fewest`: a single long sequence in a
    large batch would otherwise be read by a few processors per head while the others wait. Of a batch that has that
    number, shares have `least_keys` at least (see `least_tiles`), so that short sequences are not cut up for nothing;
    a share without keys costs next to nothing.
    """
    tile = tile_table("num_decode_splits", capability).choose()
    wanted = tile["programs_per_sm"] * capability.num_sms / max(1, num_seqs * num_kv_heads)
    splits = tile["fewest"]
    while splits < wanted and splits < tile["most"]:
        splits *= 2
    return splits


def least_tiles(capability: Capability, num_splits: int, block_n: int) -> int:
    """Return how many tiles of `block_n` keys a share of a sequence has at least, the last one excepted."""
    tile = tile_table("num_decode_splits", capability).choose()
    return max(1, tile["least_keys"] // block_n) if num_splits == tile["fewest"] else 1


def decode_workspace(
    num_seqs: int, num_heads: int, head_dim: int, num_splits: int, device: torch.device | None = None
) -> Tensor:
    """Allocate the scratch of `paged_attention_decode` for at most these sizes: per share a vector and its weight.

    Its end holds tickets (`decode_tickets`), which are zero; every call leaves them so.
    """
    size = decode_workspace_size(num_seqs, num_heads, head_dim, num_splits)
    workspace = torch.empty(size, dtype=torch.float32, device=device)
    decode_tickets(workspace, num_seqs, num_heads).zero_()
    return workspace


def decode_workspace_size(num_seqs: int, num_heads: int, head_dim: int, num_splits: int) -> int:
    """Return the length of that scratch."""
    return num_seqs * num_heads * (num_splits * (head_dim + 1) + 1) + _ALIGNED


def decode_tickets(workspace: Tensor, num_seqs: int, num_heads: int) -> Tensor:
    """Return the end of the scratch, i32, where the shares of a sequence and a kv head are counted while they are done.

    It begins at a multiple of 16 bytes, for any numbers alike: kernels are not compiled for some of them anew.
    """
    begin = (workspace.numel() - num_seqs * num_heads) // _ALIGNED * _ALIGNED
    return workspace[begin:].view(torch.int32)
