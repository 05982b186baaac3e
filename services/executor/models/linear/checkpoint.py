"""The tensors of a checkpoint that fill a linear layer."""

import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Protocol, TypeVar

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
from scalellm.services.executor.models.weight_slot import WeightSlot

_log = logging.getLogger(__name__)

_Kind = TypeVar("_Kind")
FilledWeight = tuple[LinearWeight, list[WeightSlot]]


class CheckpointFormat(Protocol):
    """The way in which a checkpoint stores its linear layers."""

    @property
    def is_choice(self) -> bool:
        """True if they can be had in the runtime's dtype as well: kept as they are only with `Quantization("keep")`."""

    @property
    def form(self) -> str:
        """Name of the type of most of them, such as Q4_1 or bfloat16."""

    @property
    def dense_dtype(self) -> torch.dtype | None:
        """The dtype of most of them; None if they are quantised."""

    def build(self, parts: Mapping[str, int], in_features: int, runtime: ModelRuntime) -> FilledWeight | None:
        """Return a weight that stacks the projections named in `parts`, with their sizes, and the slots to fill it.

        None when the checkpoint has them in full precision. Raises UnsupportedModelError.
        """


def kept(stored: CheckpointFormat | None, method: Method) -> CheckpointFormat | None:
    """Return the checkpoint's format if that is what a quantisation leaves the weights in."""
    return None if stored is None or (stored.is_choice and method != "keep") else stored


def commonest_projection(kinds: Mapping[str, _Kind], default: _Kind) -> _Kind:
    """Return what most of a checkpoint's projections are of, given it for all of its tensors by their names."""
    counts = Counter(kind for name, kind in kinds.items() if name.endswith("_proj.weight"))
    return counts.most_common(1)[0][0] if counts else default


def build_weight(
    parts: Mapping[str, int], in_features: int, stored: CheckpointFormat | None, runtime: ModelRuntime
) -> FilledWeight:
    """Return a weight and its slots: as the checkpoint stores it, or quantised on load as the runtime asks for.

    Raises:
        UnsupportedModelError: the checkpoint is quantised already, or the sizes are not those of such a weight.
    """
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


def bias_slots(parts: Mapping[str, int], bias: Tensor | None, stored: CheckpointFormat | None) -> list[WeightSlot]:
    """Return the slots of the biases that `bias` stacks.

    Without one, a quantised checkpoint may have zeros in their place, which AutoGPTQ writes for every layer.
    """
    if bias is not None:
        return [WeightSlot(f"{name}.bias", bias[rows]) for name, rows in stacked(parts)]
    if stored is None or stored.is_choice:
        return []
    names = {f"{name}.bias": size for name, size in parts.items()}
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
