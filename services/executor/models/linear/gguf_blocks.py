"""The block formats of GGUF files as integers with scales and zero points of groups (layouts: ggml-common.h)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from scalellm.services.executor.models.linear.wna16 import Bits


class Groups(NamedTuple):
    """`numbers [n, K]` u8, `scales` and `offsets [n, K / group_size]` f32: the weight is number * scale - offset.

    Without offsets, the number that stands for 0 is in `zero`.
    """

    numbers: Tensor
    scales: Tensor
    offsets: Tensor | None
    zero: int


@dataclass(frozen=True)
class BlockFormat:
    """Blocks of `num_bytes` whose numbers fit `bits` bits; `decode` takes them as `[n, blocks, num_bytes]` u8."""

    num_bytes: int
    bits: Bits
    group_size: int
    has_offsets: bool
    decode: Callable[[Tensor], Groups]


def _half(data: Tensor) -> Tensor:
    """Return the float16 `[n, blocks, 1]` in two bytes of every block."""
    return data.contiguous().view(torch.float16).float()


def _nibbles(data: Tensor) -> Tensor:
    """Return the low halves of all bytes of a block and then the high ones."""
    return torch.cat((data & 15, data >> 4), -1)


def _fifth_bits(data: Tensor) -> Tensor:
    """Return the bits of four bytes `[n, blocks, 4]`, lowest first, each in the place of 16."""
    shifts = torch.arange(8, dtype=torch.uint8, device=data.device)
    return ((data.unsqueeze(-1) >> shifts) & 1).flatten(-2) << 4


def _q4_0(blocks: Tensor) -> Groups:
    return Groups(_nibbles(blocks[..., 2:]), _half(blocks[..., :2]), None, 8)


def _q4_1(blocks: Tensor) -> Groups:
    return Groups(_nibbles(blocks[..., 4:]), _half(blocks[..., :2]), -_half(blocks[..., 2:4]), 0)


def _q5_0(blocks: Tensor) -> Groups:
    numbers = _nibbles(blocks[..., 6:]) | _fifth_bits(blocks[..., 2:6])
    return Groups(numbers, _half(blocks[..., :2]), None, 16)


def _q5_1(blocks: Tensor) -> Groups:
    numbers = _nibbles(blocks[..., 8:]) | _fifth_bits(blocks[..., 4:8])
    return Groups(numbers, _half(blocks[..., :2]), -_half(blocks[..., 2:4]), 0)


def _q8_0(blocks: Tensor) -> Groups:
    return Groups(blocks[..., 2:] ^ 128, _half(blocks[..., :2]), None, 128)  # from two's complement


def _k_scales(data: Tensor) -> tuple[Tensor, Tensor]:
    """Return the 6-bit scales and minima `[n, blocks, 8]` in twelve bytes."""
    first, second, third = torch.unflatten(data, -1, (3, 4)).unbind(-2)
    scales = torch.cat((first & 63, (third & 15) | (first >> 6 << 4)), -1)
    minima = torch.cat((second & 63, (third >> 4) | (second >> 6 << 4)), -1)
    return scales.float(), minima.float()


def _q4_k(blocks: Tensor) -> Groups:
    scales, minima = _k_scales(blocks[..., 4:16])
    numbers = _nibbles(torch.unflatten(blocks[..., 16:], -1, (4, 32)))  # four times 64 numbers
    return Groups(numbers.flatten(-2), scales * _half(blocks[..., :2]), minima * _half(blocks[..., 2:4]), 0)


def _q5_k(blocks: Tensor) -> Groups:
    scales, minima = _k_scales(blocks[..., 4:16])
    numbers = _nibbles(torch.unflatten(blocks[..., 48:], -1, (4, 32))).flatten(-2)
    # Bit s of byte l belongs to number l of the s-th 32.
    shifts = torch.arange(8, dtype=torch.uint8, device=blocks.device).unsqueeze(-1)
    numbers = numbers | (((blocks[..., 16:48].unsqueeze(-2) >> shifts) & 1) << 4).flatten(-2)
    return Groups(numbers, scales * _half(blocks[..., :2]), minima * _half(blocks[..., 2:4]), 0)


def _q6_k(blocks: Tensor) -> Groups:
    # Two halves of 128 numbers: 64 bytes with their low four bits, 32 with the high two.
    low = _nibbles(torch.unflatten(blocks[..., :128], -1, (2, 64)))
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=blocks.device).unsqueeze(-1)
    high = ((torch.unflatten(blocks[..., 128:192], -1, (2, 1, 32)) >> shifts) & 3).flatten(-2)
    scales = blocks[..., 192:208].contiguous().view(torch.int8).float()
    return Groups((low | (high << 4)).flatten(-2), scales * _half(blocks[..., 208:210]), None, 32)


BLOCK_FORMATS: Mapping[str, BlockFormat] = MappingProxyType(
    {
        "Q4_0": BlockFormat(18, 4, 32, False, _q4_0),
        "Q4_1": BlockFormat(20, 4, 32, True, _q4_1),
        "Q5_0": BlockFormat(22, 8, 32, False, _q5_0),
        "Q5_1": BlockFormat(24, 8, 32, True, _q5_1),
        "Q8_0": BlockFormat(34, 8, 32, False, _q8_0),
        "Q4_K": BlockFormat(144, 4, 32, True, _q4_k),
        "Q5_K": BlockFormat(176, 8, 32, True, _q5_k),
        "Q6_K": BlockFormat(210, 8, 16, False, _q6_k),
    }
)
