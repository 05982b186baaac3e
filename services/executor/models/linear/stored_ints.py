"""Checkpoints with 4 and 8 bit weights and scales of groups: GPTQ, AWQ and the packed format of compressed-tensors."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from services.executor.models.errors import UnsupportedModelError
from services.executor.models.linear.checkpoint import FilledWeight, stacked
from services.executor.models.linear.ignored import IgnoredLayers
from services.executor.models.linear.packing import pack_rows, per_word, unpack_rows
from services.executor.models.linear.wna16 import Bits, IntWeight
from services.executor.models.runtime import ModelRuntime
from services.executor.models.weight_slot import WeightSlot

_WORDS = (torch.int32,)
_INDICES = (torch.int32, torch.int64)
_AWQ_COLUMNS = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where AWQ's packing, made for its kernel's order of instructions, has the columns 0 to 7 of a word's eight."""


@dataclass(frozen=True)
class StoredInts:
    """What the formats have in common: numbers of `bits` bits, in groups of `group_size`; None is all of a row."""

    is_choice: ClassVar[bool] = False

    ignored: IgnoredLayers
    bits: Bits
    group_size: int | None
    symmetric: bool

    def build(self, parts: Mapping[str, int], in_features: int, runtime: ModelRuntime) -> FilledWeight | None:
        """Return the weight and its slots."""
        if self.ignored.covers(parts):
            return None
        group_size, per = self.group_size or in_features, per_word(self.bits)
        for name, size in parts.items():
            if in_features % group_size or in_features % per or size % per:
                raise UnsupportedModelError(
                    f"{name}: its shape, [{size}, {in_features}], is not a multiple of {per} numbers per word and of "
                    f"the group_size, {group_size}"
                )
        weight = IntWeight(
            sum(parts.values()),
            in_features,
            runtime,
            bits=self.bits,
            group_size=group_size,
            zeros=not self.symmetric,
        )
        return weight, [slot for name, part in stacked(parts) for slot in self.slots(name, weight.part(part), weight)]

    def slots(self, name: str, memory: Sequence[Tensor], weight: IntWeight) -> list[WeightSlot]:
        """Return the slots of one projection, whose `memory` is words, scales and, unless symmetric, zero points."""
        raise NotImplementedError

    def check_group_index(self, name: str, in_features: int, group_size: int) -> WeightSlot:
        """Return a slot that refuses groups of other than consecutive inputs."""

        def check(index: Tensor) -> tuple[Tensor, ...]:
            expected = torch.arange(in_features, dtype=index.dtype, device=index.device) // group_size
            if not torch.equal(index, expected):
                raise UnsupportedModelError(f"{name} reorders the inputs; activation order (desc_act) is not supported")
            return ()

        return WeightSlot(name, shape=(in_features,), dtypes=_INDICES, encode=check, optional=True)


@dataclass(frozen=True)
class StoredGptq(StoredInts):
    """`qweight [K / w, n]`, w numbers to a word, is the layout that is kept; `qzeros [K / g, n / w]`; `scales`.

    `zero_offset` is added to stored zero points: version 1 of the format has them one too small.
    """

    zero_offset: int = 1

    def slots(self, name: str, memory: Sequence[Tensor], weight: IntWeight) -> list[WeightSlot]:
        """Return the slots of the tensors named in the class."""
        words, scales, *zeros = memory
        groups, columns = scales.shape
        highest, middle = (1 << self.bits) - 1, 1 << (self.bits - 1)

        def decode_zeros(packed: Tensor) -> tuple[Tensor, ...]:
            points = (unpack_rows(packed.T, self.bits).T.int() + self.zero_offset) & highest
            if zeros:
                return (points,)
            if bool((points != middle).any()):
                raise UnsupportedModelError(f"{name}.qzeros: zero points other than {middle}, but sym is true")
            return ()

        in_features = words.shape[0] * per_word(self.bits)
        return [
            WeightSlot(f"{name}.qweight", words, dtypes=_WORDS),
            WeightSlot(
                f"{name}.qzeros",
                *zeros,
                shape=(groups, columns // per_word(self.bits)),
                dtypes=_WORDS,
                encode=decode_zeros,
            ),
            WeightSlot(f"{name}.scales", scales),
            self.check_group_index(f"{name}.g_idx", in_features, weight.group_size),
        ]


@dataclass(frozen=True)
class StoredAwq(StoredInts):
    """`qweight [K, n / 8]` and `qzeros [K / g, n / 8]`, eight columns to a word in an order of their own; `scales`."""

    def slots(self, name: str, memory: Sequence[Tensor], weight: IntWeight) -> list[WeightSlot]:
        """Return the slots of the tensors named in the class."""
        words, scales, zeros = memory
        groups, columns = scales.shape
        in_features = words.shape[0] * per_word(self.bits)
        return [
            WeightSlot(
                f"{name}.qweight",
                words,
                shape=(in_features, columns // per_word(self.bits)),
                dtypes=_WORDS,
                encode=lambda packed: (pack_rows(_unpack_awq(packed), self.bits),),
            ),
            WeightSlot(
                f"{name}.qzeros",
                zeros,
                shape=(groups, columns // per_word(self.bits)),
                dtypes=_WORDS,
                encode=lambda packed: (_unpack_awq(packed),),
            ),
            WeightSlot(f"{name}.scales", scales),
        ]


@dataclass(frozen=True)
class StoredPacked(StoredInts):
    """compressed-tensors' pack-quantized: `weight_packed [n, K / w]`, `weight_scale [n, K / g]`, `weight_shape` and,
    unless symmetric, `weight_zero_point [n / w, K / g]`. Packed numbers are 2^(bits - 1) larger than those they mean.
    """

    def slots(self, name: str, memory: Sequence[Tensor], weight: IntWeight) -> list[WeightSlot]:
        """Return the slots of the tensors named in the class."""
        words, scales, *zeros = memory
        groups, rows = scales.shape
        in_features = words.shape[0] * per_word(self.bits)
        slots = [
            WeightSlot(f"{name}.weight_packed", words, shape=tuple(words.T.shape), dtypes=_WORDS, encode=_transposed),
            WeightSlot(f"{name}.weight_scale", scales, shape=(rows, groups), encode=_transposed),
            WeightSlot(
                f"{name}.weight_shape",
                shape=(2,),
                dtypes=_INDICES,
                encode=_expecting(f"{name}.weight_shape", [rows, in_features]),
            ),
        ]
        if zeros:
            slots.append(
                WeightSlot(
                    f"{name}.weight_zero_point",
                    *zeros,
                    shape=(rows // per_word(self.bits), groups),
                    dtypes=_WORDS,
                    encode=lambda packed: (unpack_rows(packed, self.bits).T,),
                )
            )
        return [*slots, self.check_group_index(f"{name}.weight_g_idx", in_features, weight.group_size)]


def _unpack_awq(words: Tensor) -> Tensor:
    """Return the numbers `[r, n]` u8 of `words [r, n / 8]`."""
    numbers = unpack_rows(words.reshape(1, -1), 4).view(8, *words.shape)
    return numbers[list(_AWQ_COLUMNS)].permute(1, 2, 0).flatten(1)


def _transposed(tensor: Tensor) -> tuple[Tensor, ...]:
    return (tensor.T,)


def _expecting(name: str, expected: list[int]) -> Callable[[Tensor], tuple[Tensor, ...]]:
    def check(values: Tensor) -> tuple[Tensor, ...]:
        if values.tolist() != expected:
            raise UnsupportedModelError(f"{name} is {values.tolist()}, the configuration asks for {expected}")
        return ()

    return check
