"""GGUF files whose blocks are kept as packed integers instead of being dequantised."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from services.executor.models.linear.checkpoint import FilledWeight, stacked
from services.executor.models.linear.gguf_blocks import BLOCK_FORMATS, BlockFormat
from services.executor.models.linear.packing import pack_rows
from services.executor.models.linear.wna16 import IntWeight
from services.executor.models.runtime import ModelRuntime
from services.executor.models.weight_slot import WeightSlot


@dataclass(frozen=True)
class StoredGguf:
    """`types` maps Hugging Face names of tensors to the names of their GGUF types.

    Projections that share a matrix may differ in type: all of them then take the widest numbers and the smallest
    groups, in which each is as exact as in its own. One of a type that is not in `BLOCK_FORMATS` makes all of them
    dequantised.
    """

    is_choice: ClassVar[bool] = True

    types: Mapping[str, str]

    def build(self, parts: Mapping[str, int], in_features: int, runtime: ModelRuntime) -> FilledWeight | None:
        """Return the weight and its slots."""
        names = [self.types.get(f"{name}.weight", "") for name in parts]
        if any(name not in BLOCK_FORMATS for name in names):
            return None
        formats = [BLOCK_FORMATS[name] for name in names]
        weight = IntWeight(
            sum(parts.values()),
            in_features,
            runtime,
            bits=max(form.bits for form in formats),
            group_size=min(form.group_size for form in formats),
            zeros=any(form.has_offsets for form in formats),
        )
        slots = [
            WeightSlot(
                f"{name}.weight",
                *weight.part(rows),
                shape=(rows.stop - rows.start, in_features),
                dtypes=(torch.uint8,),
                encode=_encoder(form, weight),
            )
            for (name, rows), form in zip(stacked(parts), formats, strict=True)
        ]
        return weight, slots


def _encoder(form: BlockFormat, weight: IntWeight) -> Callable[[Tensor], tuple[Tensor, ...]]:
    middle = 1 << (weight.bits - 1)

    def encode(rows: Tensor) -> tuple[Tensor, ...]:
        """Return words, scales and, if the weight has them, zero points of rows `[n, bytes]`."""
        groups = form.decode(torch.unflatten(rows, 1, (-1, form.num_bytes)))
        numbers, scales = groups.numbers.flatten(1), groups.scales.flatten(1)
        if groups.offsets is None:
            zeros = torch.full_like(scales, groups.zero)
            if weight.zeros is None:
                numbers = numbers + (middle - groups.zero)
        else:
            offsets = groups.offsets.flatten(1)
            # Where the scale is 0 the numbers have no say, and 0 - 1 times the offset is the weight.
            constant = scales == 0
            numbers = numbers.masked_fill(constant.repeat_interleave(form.group_size, 1), 0)
            scales = torch.where(constant, offsets, scales)
            zeros = torch.where(constant, 1.0, offsets / scales)
            zeros = torch.where(scales == 0, 0.0, zeros)
        repeat = form.group_size // weight.group_size
        memory = [pack_rows(numbers.T, weight.bits)]
        memory += [t.repeat_interleave(repeat, 1).T for t in (scales, zeros)[: 1 if weight.zeros is None else 2]]
        return tuple(memory)

    return encode
