"""The division of the keys of a decode batch among the multiprocessors of a device."""

import torch
from torch import Tensor

from scalellm.kernels.capability import Capability
from scalellm.kernels.tiles import tile_table

_ALIGNED = 4  # elements of 4 bytes in 16 bytes


def num_decode_splits(capability: Capability, num_kv_heads: int) -> int:
    """Return `num_splits` for `paged_attention_decode`, the most shares of a sequence: a power of two, up to 64.

    The number gives each multiprocessor a few programs when one long sequence is alone. It depends on the device and
    the model, not on the batch, and a sequence's shares depend on its own length, so the order of its sums does not
    depend on the other sequences.
    """
    tile = tile_table("num_decode_splits", capability).choose()
    wanted = tile["programs_per_sm"] * capability.num_sms / num_kv_heads
    splits = 1
    while splits < wanted and splits < tile["most"]:
        splits *= 2
    return splits


def least_tiles(capability: Capability, block_n: int) -> int:
    """Return the least number of tiles of `block_n` keys in a share of a sequence, except for the last share.

    Short sequences are not divided further, because each share costs a write of its result and a read by one program.
    """
    return max(1, tile_table("num_decode_splits", capability).choose()["least_keys"] // block_n)


def decode_programs(capability: Capability, num_seqs: int, num_splits: int) -> int:
    """Return the number of programs per kv head, among which the shares of all sequences are divided.

    It depends on shapes alone, as required for the grid of a captured graph: enough for all shares of one long
    sequence, and for most shares of many sequences. If there are more shares, programs process several.
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
    """Return the length of the scratch of `decode_workspace`."""
    return num_seqs * num_heads * (num_splits * (head_dim + 1) + 1) + _ALIGNED


def decode_tickets(workspace: Tensor, num_seqs: int, num_heads: int) -> Tensor:
    """Return the end of the scratch, i32, in which the finished shares of each sequence and kv head are counted.

    It begins at a multiple of 16 bytes for all sizes, so that no further variants of kernels are compiled.
    """
    begin = (workspace.numel() - num_seqs * num_heads) // _ALIGNED * _ALIGNED
    return workspace[begin:].view(torch.int32)
