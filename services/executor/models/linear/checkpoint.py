"""The tensors of a checkpoint that fill a linear layer."""

import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from scalellm.services.executor.model_config.errors import UnsupportedModelError
from scalellm.services.executor.models.linear.dense import DenseWeight
from scalellm.services.executor.models.linear.fp8 import Fp8Weight
from scalellm.services.executor.models.linear.packing import per_word
from scalellm.services.executor.models.linear.quantised import LinearWeight
from scalellm.services.executor.models.linear.wna16 import Bits, IntWeight
from scalellm.services.executor.models.quantization import Method
from scalellm.services.executor.models.runtime import ModelRuntime
from scalellm.services.executor.models.shard import Part
from scalellm.services.executor.models.weight_slot import WeightSlot

_log = logging.getLogger(__name__)

_Kind = TypeVar("_Kind")
FilledWeight = tuple[LinearWeight, list[WeightSlot]]


class Borders(NamedTuple):
    """The multiples of rows and columns at which a matrix may be divided: words, groups and blocks stay whole."""

    rows: int = 1
    columns: int = 1


class CheckpointFormat(Protocol):
    """The way in which a checkpoint stores its linear layers."""

    @property
    def is_choice(self) -> bool:
        """True if the weights can also be converted to the runtime's dtype, so that they are kept as stored only with
        `Quantization("keep")`.
        """

    @property
    def form(self) -> str:
        """Name of the type of most of them, such as Q4_1 or bfloat16."""

    @property
    def dense_dtype(self) -> torch.dtype | None:
        """The dtype of most of them; None if they are quantised."""

    def borders(self, names: Iterable[str]) -> Borders:
        """Return where projections that share a matrix may be divided among ranks."""

    def build(self, parts: Mapping[str, int], in_features: int, runtime: ModelRuntime) -> FilledWeight | None:
        """Return a weight that stacks the projections named in `parts`, with their sizes, and the slots to fill it.

        None when the checkpoint has them in full precision. Raises UnsupportedModelError.
        """


def kept(stored: CheckpointFormat | None, method: Method) -> CheckpointFormat | None:
    """Return the checkpoint's format if a quantisation method keeps the weights in it; else None."""
    return None if stored is None or (stored.is_choice and method != "keep") else stored


def commonest_projection(kinds: Mapping[str, _Kind], default: _Kind) -> _Kind:
    """Return the most frequent kind among a checkpoint's projections, given the kinds of all its tensors by name."""
    counts = Counter(kind for name, kind in kinds.items() if name.endswith("_proj.weight"))
    return counts.most_common(1)[0][0] if counts else default


def kinds_of_experts(kinds: Mapping[str, _Kind]) -> Mapping[str, set[_Kind]]:
    """Return the kinds of the experts of each layer by their common prefix (`prefix_of_experts`), given the kinds of
    all tensors by name.
    """
    found: dict[str, set[_Kind]] = {}
    for name, kind in kinds.items():
        if prefix := prefix_of_experts(name):
            found.setdefault(prefix, set()).add(kind)
    return found


def prefix_of_experts(name: str) -> str:
    """Return the common prefix of the names of a layer's experts; empty for a tensor that is not an expert's."""
    prefix, experts, _ = name.partition(".experts.")
    return prefix if experts else ""


def inner_border(
    names: Sequence[str], hidden: int, inner: int, stored: CheckpointFormat | None, runtime: ModelRuntime
) -> int:
    """Return the multiples at which the inner features of a gated MLP may be divided among ranks.

    `names` are those of its gate, up and down projections. 16 features stay together if the MLP has a multiple of that
    many: kernels are fast on such shares.
    """
    *outputs, down = names
    rows, columns = _borders(outputs, hidden, stored, runtime).rows, _borders([down], inner, stored, runtime).columns
    return math.lcm(rows, columns, math.gcd(inner, 16))


def _borders(names: Iterable[str], in_features: int, stored: CheckpointFormat | None, runtime: ModelRuntime) -> Borders:
    """Return where projections may be divided among ranks, as the checkpoint has them and as they are to be held."""
    rows, columns = Borders() if stored is None else stored.borders(names)
    if runtime.quantization.method in ("int8", "int4"):
        columns = math.lcm(columns, math.gcd(runtime.quantization.group_size, in_features))
    return Borders(rows, columns)


def build_weight(
    parts: Mapping[str, Part], in_features: Part, stored: CheckpointFormat | None, runtime: ModelRuntime
) -> FilledWeight:
    """Return a weight and its slots: as the checkpoint stores it, or quantised on load as the runtime asks for.

    Of projections of which this rank has a part, either rows or columns, the slots read that part.

    Raises:
        UnsupportedModelError: the checkpoint is quantised already, or the sizes are not those of such a weight, or it
            cannot be divided like this.
    """
    if not in_features.is_cut and not any(part.is_cut for part in parts.values()):
        return _build({name: part.size for name, part in parts.items()}, in_features.size, stored, runtime)
    _check_borders(parts, in_features, _borders(parts, in_features.whole, stored, runtime))
    if in_features.is_cut:  # groups are those of the whole matrix
        group_size = math.gcd(runtime.quantization.group_size, in_features.whole)
        runtime = replace(runtime, quantization=replace(runtime.quantization, group_size=group_size))
    weight, slots = _build({name: part.size for name, part in parts.items()}, in_features.size, stored, runtime)
    without_memory = replace(runtime, device=torch.device("meta"), allocate=torch.empty)
    whole, wholes = _build(
        {name: part.whole for name, part in parts.items()}, in_features.whole, stored, without_memory
    )
    if in_features.is_cut and isinstance(whole, IntWeight) and whole.order is not None:
        raise UnsupportedModelError(
            f"tensor_parallel: {next(iter(parts))} has its inputs in activation order (desc_act, actorder), which "
            "cannot be divided among ranks"
        )
    return weight, [
        slot.cut_from(whole_slot, in_features if in_features.is_cut else _part_of(parts, slot.name))
        for slot, whole_slot in zip(slots, wholes, strict=True)
    ]


def _part_of(parts: Mapping[str, Part], slot: str) -> Part:
    return next(part for name, part in parts.items() if slot.startswith(f"{name}."))


def _check_borders(parts: Mapping[str, Part], in_features: Part, borders: Borders) -> None:
    """Refuse to divide words, groups and blocks."""
    for name, part, border, what in (
        *((name, part, borders.rows, "rows") for name, part in parts.items()),
        (next(iter(parts)), in_features, borders.columns, "inputs"),
    ):
        for at in (part.start, part.stop):
            if at % border and at != part.whole:
                raise UnsupportedModelError(
                    f"tensor_parallel: {name} has {part.whole} {what}, of which a rank would get {part.start} to "
                    f"{part.stop - 1}; they can be divided at multiples of {border} only"
                )


def _build(
    parts: Mapping[str, int], in_features: int, stored: CheckpointFormat | None, runtime: ModelRuntime
) -> FilledWeight:
    method = runtime.quantization.method
    if (stored := kept(stored, method)) is not None:
        if method not in ("none", "keep"):
            raise UnsupportedModelError(f"quantization {method}: the checkpoint is quantised already; leave it out")
        if (filled := stored.build(parts, in_features, runtime)) is not None:
            return filled
        method = "none"
    rows = sum(parts.values())
    weight = _empty(next(iter(parts)), rows, in_features, runtime) if method != "none" else None
    weight = weight or DenseWeight(rows, in_features, runtime)
    return weight, plain_slots(weight, parts, in_features)


def plain_slots(weight: LinearWeight, parts: Mapping[str, int], in_features: int) -> list[WeightSlot]:
    """Return the slots of a weight that is filled with matrices in full precision."""
    return [
        WeightSlot(
            f"{name}.weight",
            *weight.part(rows),
            shape=(rows.stop - rows.start, in_features),
            encode=None if isinstance(weight, DenseWeight) else weight.encode,
        )
        for name, rows in stacked(parts)
    ]


def bias_slots(parts: Mapping[str, Part], bias: Tensor | None, stored: CheckpointFormat | None) -> list[WeightSlot]:
    """Return the slots of the biases that `bias` stacks.

    Without one, a quantised checkpoint may have zeros in their place, which AutoGPTQ writes for every layer.
    """
    if bias is not None:
        sizes = {name: part.size for name, part in parts.items()}
        windows = {name: (slice(part.start, part.stop),) if part.is_cut else None for name, part in parts.items()}
        return [WeightSlot(f"{name}.bias", bias[rows], window=windows[name]) for name, rows in stacked(sizes)]
    if stored is None or stored.is_choice:
        return []
    names = {f"{name}.bias": part.whole for name, part in parts.items()}
    return [
        WeightSlot(name, shape=(size,), encode=partial(_expect_zeros, name), optional=True)
        for name, size in names.items()
    ]


def stacked(parts: Mapping[str, int]) -> Iterator[tuple[str, slice]]:
    """Yield every part with its rows of the stack."""
    start = 0
    for name, size in parts.items():
        yield name, slice(start, start + size)
        start += size


def _expect_zeros(name: str, bias: Tensor) -> tuple[Tensor, ...]:
    if bool(bias.any()):
        raise UnsupportedModelError(f"{name} is not zero; the configuration says that there is no bias")
    return ()


def _empty(name: str, rows: int, columns: int, runtime: ModelRuntime) -> LinearWeight | None:
    wanted = runtime.quantization
    match wanted.method:
        case "none" | "keep":
            return None
        case "fp8":
            return Fp8Weight(rows, columns, runtime, granularity=wanted.granularity)
        case "int4" | "int8":
            bits: Bits = 4 if wanted.method == "int4" else 8
            group_size = math.gcd(wanted.group_size, columns)
            if group_size % per_word(bits):
                raise UnsupportedModelError(
                    f"quantization {wanted.method}: {name} has {columns} input features, of which no group is a "
                    f"multiple of {per_word(bits)}"
                )
            if group_size != wanted.group_size:
                _log.info("%s: %d input features are quantised in groups of %d", name, columns, group_size)
            return IntWeight(rows, columns, runtime, bits=bits, group_size=group_size, zeros=bits == 4)
