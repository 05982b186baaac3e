"""The division of a decode batch's keys among the processors of a device."""

import torch
from torch import Tensor

from scalellm.kernels.capability import Capability
from scalellm.kernels.tiles import tile_table

_ALIGNED = 4  # elements of 4 bytes in 16 bytes


def num_decode_splits(capability: Capability, num_kv_heads: int) -> int:
    """Return `num_splits` for `paged_attention_decode`, the most shares of a sequence: a power of two, up to 64.

    As many as give each processor a few programs when one long sequence is alone. It follows from the device and the
    model and not from the batch, and a sequence's shares follow from its own length: so its sums have the same order
    whatever is beside it.
    """
    tile = tile_table("num_decode_splits", capability).choose()
    wanted = tile["programs_per_sm"] * capability.num_sms / num_kv_heads
    splits = 1
    while splits < wanted and splits < tile["most"]:
        splits *= 2
    return splits


def least_tiles(capability: Capability, block_n: int) -> int:
    """Return how many tiles of `block_n` keys a share of a sequence has at least, the last one excepted.

    Short sequences are not cut up for nothing: a share writes its result and one program reads all of them.
    """
    return max(1, tile_table("num_decode_splits", capability).choose()["least_keys"] // block_n)


def decode_programs(capability: Capability, num_seqs: int, num_splits: int) -> int:
    """Return how many programs divide the shares of all sequences among them, for each kv head.

    It follows from shapes alone, as the grid of a captured graph has to: enough for all shares of one long sequence,
    and where there are many sequences for most of theirs. Where lengths make more shares, programs take several.
    """
    each = tile_table("num_decode_splits", capability).choose()["programs_per_seq"]
    return min(num_seqs * num_splits, max(num_splits, num_seqs * each))


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
