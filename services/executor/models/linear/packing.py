"""Numbers of 4 and 8 bits in words of 32, lowest bits first, as `kernels.w4a16_gemm` and most checkpoints have them."""

import torch
from torch import Tensor


def per_word(bits: int) -> int:
    """Return how many numbers a word holds."""
    return 32 // bits


def pack_rows(numbers: Tensor, bits: int) -> Tensor:
    """Return the words `[K / per_word, N]` i32 of `numbers [K, N]`, any integers in 0 .. 2^bits - 1."""
    columns = numbers.to(torch.uint8).T.contiguous()  # most callers have them like this: words are then four bytes
    if bits == 4:
        columns = columns[:, 0::2] | columns[:, 1::2] << 4
    return columns.flatten().view(torch.int32).view(numbers.shape[1], -1).T


def unpack_rows(words: Tensor, bits: int) -> Tensor:
    """Return the numbers `[K, N]` u8 of `words [K / per_word, N]` i32."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device).view(1, -1, 1)
    numbers = (words.unsqueeze(1) >> shifts) & ((1 << bits) - 1)
    return numbers.to(torch.uint8).flatten(0, 1)


def interleave_rows_(words: Tensor, bits: int, interleave: int) -> None:
    """Put `words [K / per_word, N]` into the order that ops multiply with this `interleave`, which divides their rows.

    A few rows at a time, so that it takes little memory beside the words.
    """
    for some in torch.split(words, 64 * interleave):
        numbers = torch.unflatten(unpack_rows(some, bits), 0, (-1, per_word(bits), interleave))
        some.copy_(pack_rows(numbers.transpose(1, 2).flatten(0, 2), bits))
