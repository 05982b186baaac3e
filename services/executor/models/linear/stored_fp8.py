"""Checkpoints with e4m3 weights: DeepSeek's blocks, and the scales of compressed-tensors, AutoFP8 and vLLM's fp8."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from scalellm.services.executor.model_config.errors import UnsupportedModelError
from scalellm.services.executor.models.linear.checkpoint import Borders, FilledWeight, stacked
from scalellm.services.executor.models.linear.fp8 import E4M3, Fp8Weight
from scalellm.services.executor.models.linear.ignored import IgnoredLayers
from scalellm.services.executor.models.runtime import ModelRuntime
from scalellm.services.executor.models.weight_slot import WeightSlot


@dataclass(frozen=True)
class StoredFp8:
    """`weight [n, K]` e4m3 and its scale, times which it is the weight.

    The scale, `weight_scale` or `weight_scale_inv`, is one element, `[n, 1]` with `per_row`, or with `block` (bn, bk)
    one per block, `[n / bn, K / bk]`. With `static_input` every projection has an `input_scale` or, as transformers
    calls it, `activation_scale`, one element.
    """

    is_choice: ClassVar[bool] = False
    form: ClassVar[str] = "fp8"
    dense_dtype: ClassVar[None] = None

    ignored: IgnoredLayers
    per_row: bool = False
    block: tuple[int, int] | None = None
    static_input: bool = False

    def borders(self, names: Iterable[str]) -> Borders:
        """Return the size of the blocks."""
        return Borders() if self.block is None or self.ignored.covers(names) else Borders(*self.block)

    def build(self, parts: Mapping[str, int], in_features: int, runtime: ModelRuntime) -> FilledWeight | None:
        """Return the weight; the input scale of stacked projections, which read the same, is the largest of theirs."""
        if self.ignored.covers(parts):
            return None
        if self.block is not None:
            self._check_blocks(parts, in_features, self.block)
        rows = sum(parts.values())
        weight = Fp8Weight(rows, in_features, runtime, block=self.block, static_input=self.static_input)
        slots: list[WeightSlot] = []
        for name, part in stacked(parts):
            slots.append(WeightSlot(f"{name}.weight", weight.codes[part], dtypes=(E4M3,)))
            slots.append(self._scale_slot(name, weight.scale, part))
        if weight.input_scale is not None:
            first, *others = parts
            slots.append(_input_scale_slot(first, weight.input_scale))
            raise_to = _raising(weight.input_scale)
            slots += [_input_scale_slot(name, encode=raise_to) for name in others]
        return weight, slots

    def _scale_slot(self, projection: str, scale: Tensor, rows: slice) -> WeightSlot:
        # Both names mean what numbers are multiplied by; "inverse" is that of what they were multiplied by before.
        name, aliases = f"{projection}.weight_scale", (f"{projection}.weight_scale_inv",)
        if self.block is not None:
            block_rows = self.block[0]
            return WeightSlot(name, scale[rows.start // block_rows : rows.stop // block_rows], aliases=aliases)
        if self.per_row:
            return WeightSlot(name, scale[rows], aliases=aliases)
        return WeightSlot(name, scale[rows], shape=(), encode=lambda one: (one.view(1, 1),), aliases=aliases)

    def _check_blocks(self, parts: Mapping[str, int], in_features: int, block: tuple[int, int]) -> None:
        for name, size in parts.items():
            if size % block[0] or in_features % block[1]:
                raise UnsupportedModelError(
                    f"{name}: blocks of {block[0]} x {block[1]} (weight_block_size) do not divide its shape, "
                    f"[{size}, {in_features}]"
                )


def _input_scale_slot(
    projection: str, *dests: Tensor, encode: Callable[[Tensor], tuple[Tensor, ...]] | None = None
) -> WeightSlot:
    aliases = (f"{projection}.activation_scale",)
    return WeightSlot(f"{projection}.input_scale", *dests, shape=(), encode=encode, aliases=aliases)


def _raising(largest: Tensor) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """Return a function that keeps the larger of its argument and the scale, once the scale has been filled."""

    def raise_to(scale: Tensor) -> tuple[Tensor, ...]:
        torch.maximum(largest, scale.view(1).to(largest.dtype), out=largest)
        return ()

    return raise_to
