"""GGUF files whose blocks and 16-bit numbers are kept instead of being converted to the runtime's dtype."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import ClassVar

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from scalellm.services.executor.models.linear.checkpoint import (
    Borders,
    FilledWeight,
    commonest_projection,
    kinds_of_experts,
    prefix_of_experts,
    stacked,
)
from scalellm.services.executor.models.linear.gguf_blocks import BLOCK_FORMATS, BlockFormat
from scalellm.services.executor.models.linear.packing import pack_rows
from scalellm.services.executor.models.linear.stored_dense import build_half
from scalellm.services.executor.models.linear.wna16 import IntWeight
from scalellm.services.executor.models.runtime import ModelRuntime
from scalellm.services.executor.models.weight_slot import WeightSlot

_DENSE_TYPES: Mapping[str, torch.dtype] = MappingProxyType({"F16": torch.float16, "BF16": torch.bfloat16})


@dataclass(frozen=True)
class StoredGguf:
    """`types` maps Hugging Face names of tensors to the names of their GGUF types.

    Projections that share a matrix, or are multiplied by one op as all experts of a layer are, may differ in type: they
    all take the widest numbers and the smallest groups, in which each is as exact as in its own. One of a type that is
    not in `BLOCK_FORMATS` makes all of them dequantised, except where all are of one 16-bit type.
    """

    is_choice: ClassVar[bool] = True

    types: Mapping[str, str]

    @cached_property
    def form(self) -> str:
        """The GGUF type of most tensors that are multiplied."""
        return commonest_projection(self.types, "F32")

    @property
    def dense_dtype(self) -> torch.dtype | None:
        """The dtype of that type; None if it is quantised."""
        return None if self.form in BLOCK_FORMATS else _DENSE_TYPES.get(self.form, torch.float32)

    def borders(self, names: Iterable[str]) -> Borders:
        """Return the numbers of the largest block; those of formats that are only dequantised are in blocks as well."""
        kinds = {self.types.get(f"{name}.weight", "F32") for name in names}
        return Borders(1, max(GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0] for kind in kinds))

    def build(self, parts: Mapping[str, int], in_features: int, runtime: ModelRuntime) -> FilledWeight | None:
        """Return the weight and its slots."""
        kinds = {name: self.types.get(f"{name}.weight", "") for name in parts}
        alike = self._kinds_of_experts.get(prefix_of_experts(next(iter(parts))), set()) | set(kinds.values())
        if not alike <= BLOCK_FORMATS.keys():
            return build_half(parts, in_features, runtime, {_DENSE_TYPES.get(kind) for kind in alike})
        formats = [BLOCK_FORMATS[kind] for kind in alike]
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
                encode=_encoder(BLOCK_FORMATS[kinds[name]], weight),
            )
            for name, rows in stacked(parts)
        ]
        return weight, slots

    @cached_property
    def _kinds_of_experts(self) -> Mapping[str, set[str]]:
        return kinds_of_experts(self.types)


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
            # With a scale of 0 the numbers do not matter, and 0 - 1 times the offset is the weight.
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
