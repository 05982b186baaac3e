"""Checkpoints with 4 and 8 bit weights and scales of groups: GPTQ, AWQ and the packed format of compressed-tensors."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from scalellm.services.executor.model_config.errors import UnsupportedModelError
from scalellm.services.executor.models.linear.checkpoint import Borders, FilledWeight, stacked
from scalellm.services.executor.models.linear.ignored import IgnoredLayers
from scalellm.services.executor.models.linear.packing import pack_rows, per_word, unpack_rows
from scalellm.services.executor.models.linear.wna16 import Bits, IntWeight
from scalellm.services.executor.models.runtime import ModelRuntime
from scalellm.services.executor.models.weight_slot import WeightSlot

_WORDS = (torch.int32,)
_INDICES = (torch.int32, torch.int64)
_AWQ_COLUMNS = (0, 4, 1, 5, 2, 6, 3, 7)
"""Places of a word's columns 0 to 7 in AWQ's packing, which follows its kernel's order of instructions."""


@dataclass(frozen=True)
class StoredInts:
    """The common part of the formats: numbers of `bits` bits, in groups of `group_size`; None is all of a row.

    A tensor `index_name`, if the format has one, says which group each input is in: with `ordered` any (GPTQ's
    activation order), consecutive ones otherwise. A group longer than `longest_group` is kept as several that have the
    same scale: of weights multiplied by one op, the groups must be of one size.
    """

    is_choice: ClassVar[bool] = False
    dense_dtype: ClassVar[None] = None
    index_name: ClassVar[str | None] = None

    ignored: IgnoredLayers
    bits: Bits
    group_size: int | None
    symmetric: bool
    ordered: bool = False
    longest_group: int | None = field(default=None, kw_only=True)

    @property
    def form(self) -> str:
        """The integers' type."""
        return f"int{self.bits}"

    def borders(self, names: Iterable[str]) -> Borders:
        """Return the numbers of a word and of a group."""
        per = per_word(self.bits)
        return Borders() if self.ignored.covers(names) else Borders(per, math.lcm(per, self.group_size or 1))

    def build(self, parts: Mapping[str, int], in_features: int, runtime: ModelRuntime) -> FilledWeight | None:
        """Return the weight and its slots."""
        if self.ignored.covers(parts):
            return None
        group_size, per = self.group_size or in_features, per_word(self.bits)
        kept_size = math.gcd(group_size, self.longest_group or group_size)
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
            group_size=kept_size,
            zeros=not self.symmetric,
            ordered=self.ordered and group_size < in_features,
        )
        slots: list[WeightSlot] = []
        if self.index_name is not None:  # before the numbers, which are put in that order
            names = [f"{name}.{self.index_name}" for name in parts]
            slots += [_index_slot(name, names[0], weight, in_features, group_size) for name in names]
        for name, part in stacked(parts):
            slots += self.slots(name, weight.part(part), weight, group_size // kept_size)
        return weight, slots

    def slots(self, name: str, memory: Sequence[Tensor], weight: IntWeight, repeat: int) -> list[WeightSlot]:
        """Return the slots of one projection, whose `memory` is words, scales and, unless symmetric, zero points.

        Every group is kept as `repeat` groups.
        """
        raise NotImplementedError

    def reordered(self, words: Tensor, weight: IntWeight) -> Tensor:
        """Return words `[K / w, n]` of rows in the order of the inputs with the rows in the weight's order."""
        return words if weight.order is None else pack_rows(unpack_rows(words, self.bits)[weight.order], self.bits)


@dataclass(frozen=True)
class StoredGptq(StoredInts):
    """`qweight [K / w, n]`, w numbers to a word, is the layout that is kept; `qzeros [K / g, n / w]`; `scales`.

    `zero_offset` is added to stored zero points: version 1 of the format has them one too small.
    """

    index_name: ClassVar[str | None] = "g_idx"

    zero_offset: int = 1

    def slots(self, name: str, memory: Sequence[Tensor], weight: IntWeight, repeat: int) -> list[WeightSlot]:
        """Return the slots of the tensors named in the class."""
        words, scales, *zeros = memory
        groups, columns = scales.shape
        highest, middle = (1 << self.bits) - 1, 1 << (self.bits - 1)

        def decode_zeros(packed: Tensor) -> tuple[Tensor, ...]:
            points = unpack_rows(packed.T, self.bits).T.int()
            if zeros:
                return (_repeated((points + self.zero_offset) & highest, repeat),)
            # Some files say version 1 and have the zero points of version 2; which it is makes no difference here.
            if not (bool((points == middle - 1).all()) or bool((points == middle).all())):
                raise UnsupportedModelError(f"{name}.qzeros: zero points other than {middle}, but sym is true")
            return ()

        return [
            WeightSlot(
                f"{name}.qweight", words, dtypes=_WORDS, encode=lambda packed: (self.reordered(packed, weight),)
            ),
            WeightSlot(
                f"{name}.qzeros",
                *zeros,
                shape=(groups // repeat, columns // per_word(self.bits)),
                dtypes=_WORDS,
                encode=decode_zeros,
            ),
            WeightSlot(
                f"{name}.scales",
                scales,
                shape=(groups // repeat, columns),
                encode=lambda stored: (_repeated(stored, repeat),),
            ),
        ]


@dataclass(frozen=True)
class StoredAwq(StoredInts):
    """`qweight [K, n / 8]` and `qzeros [K / g, n / 8]`, eight columns to a word in an order of their own; `scales`."""

    def slots(self, name: str, memory: Sequence[Tensor], weight: IntWeight, repeat: int) -> list[WeightSlot]:
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
                shape=(groups // repeat, columns // per_word(self.bits)),
                dtypes=_WORDS,
                encode=lambda packed: (_repeated(_unpack_awq(packed), repeat),),
            ),
            WeightSlot(
                f"{name}.scales",
                scales,
                shape=(groups // repeat, columns),
                encode=lambda stored: (_repeated(stored, repeat),),
            ),
        ]


@dataclass(frozen=True)
class StoredPacked(StoredInts):
    """compressed-tensors' pack-quantized: `weight_packed [n, K / w]`, `weight_scale [n, K / g]`, `weight_shape` and,
    unless symmetric, `weight_zero_point [n / w, K / g]`. Packed numbers are 2^(bits - 1) larger than those they mean.
    """

    index_name: ClassVar[str | None] = "weight_g_idx"

    def slots(self, name: str, memory: Sequence[Tensor], weight: IntWeight, repeat: int) -> list[WeightSlot]:
        """Return the slots of the tensors named in the class."""
        words, scales, *zeros = memory
        groups, rows = scales.shape
        in_features = words.shape[0] * per_word(self.bits)
        slots = [
            WeightSlot(
                f"{name}.weight_packed",
                words,
                shape=tuple(words.T.shape),
                dtypes=_WORDS,
                encode=lambda packed: (self.reordered(packed.T, weight),),
            ),
            WeightSlot(
                f"{name}.weight_scale",
                scales,
                shape=(rows, groups // repeat),
                encode=lambda stored: (_repeated(stored.T, repeat),),
            ),
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
                    shape=(rows // per_word(self.bits), groups // repeat),
                    dtypes=_WORDS,
                    encode=lambda packed: (_repeated(unpack_rows(packed, self.bits).T, repeat),),
                )
            )
        return slots


@dataclass(frozen=True)
class StoredInt8(StoredInts):
    """compressed-tensors' int-quantized: `weight [n, K]` i8 and `weight_scale [n, 1]`."""

    def slots(self, name: str, memory: Sequence[Tensor], weight: IntWeight, repeat: int) -> list[WeightSlot]:
        """Return the slots of the tensors named in the class."""
        words, scales = memory
        return [
            WeightSlot(
                f"{name}.weight",
                words,
                shape=(words.shape[1], words.shape[0] * per_word(self.bits)),
                dtypes=(torch.int8,),
                encode=lambda numbers: (pack_rows(numbers.T.int() + 128, self.bits),),
            ),
            WeightSlot(
                f"{name}.weight_scale",
                scales,
                shape=(scales.shape[1], scales.shape[0] // repeat),
                encode=lambda stored: (_repeated(stored.T, repeat),),
            ),
        ]


def _index_slot(name: str, first: str, weight: IntWeight, in_features: int, group_size: int) -> WeightSlot:
    """Return the slot of an index; that of the `first` projection of a matrix fills the order of all."""
    order = weight.order

    def check(index: Tensor) -> tuple[Tensor, ...]:
        expected = torch.arange(in_features, dtype=index.dtype, device=index.device) // group_size
        if order is None:
            if not torch.equal(index, expected):
                raise UnsupportedModelError(
                    f"{name} reorders the inputs; the configuration (desc_act, actorder) does not"
                )
            return ()
        ascending = torch.argsort(index, stable=True)
        if not torch.equal(index[ascending], expected):
            raise UnsupportedModelError(f"{name}: its groups are not of {group_size} inputs each")
        if name == first:
            return (ascending,)
        if not torch.equal(order, ascending.to(order.dtype)):
            raise UnsupportedModelError(f"{name} differs from {first}; projections of one input must order it alike")
        return ()

    dests = () if order is None or name != first else (order,)
    return WeightSlot(name, *dests, shape=(in_features,), dtypes=_INDICES, encode=check, optional=order is None)


def _unpack_awq(words: Tensor) -> Tensor:
    """Return the numbers `[r, n]` u8 of `words [r, n / 8]`."""
    numbers = unpack_rows(words.reshape(1, -1), 4).view(8, *words.shape)
    return numbers[list(_AWQ_COLUMNS)].permute(1, 2, 0).flatten(1)


def _repeated(groups: Tensor, times: int) -> Tensor:
    return groups.repeat_interleave(times, 0)


def _expecting(name: str, expected: list[int]) -> Callable[[Tensor], tuple[Tensor, ...]]:
    def check(values: Tensor) -> tuple[Tensor, ...]:
        if values.tolist() != expected:
            raise UnsupportedModelError(f"{name} is {values.tolist()}, the configuration asks for {expected}")
        return ()

    return check
