"""Projections of one input, stacked into one matrix."""

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from scalellm.kernels import Gate
from scalellm.services.executor.models.linear.checkpoint import CheckpointFormat, bias_slots, build_weight
from scalellm.services.executor.models.linear.dense import DenseWeight
from scalellm.services.executor.models.linear.quantised import LinearInput, NormedInput, ToAdd
from scalellm.services.executor.models.runtime import ModelRuntime
from scalellm.services.executor.models.shard import Part
from scalellm.services.executor.models.weight_slot import WeightSlot, finish_with


class PackedLinear:
    """y = x W^T + b, where W stacks the rows of one or more projections.

    `parts` maps their names under `prefix` to output sizes; `stored` is how the checkpoint has them, if quantised. A
    rank of several may have a part of the outputs, or of the inputs: the results of all ranks are then added up.
    """

    def __init__(
        self,
        prefix: str,
        in_features: Part,
        parts: dict[str, Part],
        *,
        bias: bool,
        stored: CheckpointFormat | None,
        runtime: ModelRuntime,
    ) -> None:
        names = {f"{prefix}.{name}": part for name, part in parts.items()}
        self._weight, self._slots = build_weight(names, in_features, stored, runtime)
        self._bias = runtime.empty(sum(part.size for part in parts.values())) if bias else None
        finish_with(self._weight.finish, self._slots)
        self._slots += bias_slots(names, self._bias, stored)
        self._collectives = runtime.shard.collectives if in_features.is_cut else None

    def __call__(self, x: LinearInput) -> Tensor:
        """`[T, in]` -> `[T, out]`."""
        if self._collectives is None:
            return self._weight.product(x, self._bias)
        y = self._collectives.all_reduce(self._weight.product(x, None).contiguous())
        return y if self._bias is None else y.add_(self._bias)

    def norms_inputs(self, rows: int) -> bool:
        """True if this layer takes a `NormedInput` with this number of rows."""
        return self._fusing(rows) is not None

    def gated(self, x: LinearInput, gate: Gate, op: Callable[..., Tensor], into: "PackedLinear") -> LinearInput:
        """Return the input of `into`: the halves of y, the activated first times the second, as `op` computes it."""
        if isinstance(x, Tensor | NormedInput):
            rows = x.shape[0] if isinstance(x, Tensor) else x.hidden.shape[0]
            weight = self._fusing(rows, gate)
            if weight is not None:
                return weight.gated(x, self._bias, gate)
        return into.input_from(op, self(x))

    def added(self, x: LinearInput, residual: Tensor) -> ToAdd:
        """Add y to `residual [T, out]` in place, or return it for the next norm to add."""
        if isinstance(x, Tensor):
            weight = self._fusing(x.shape[0])
            if weight is not None:
                return weight.added(x, self._bias, residual)
        return self(x)

    def _fusing(self, rows: int, gate: Gate | None = None) -> DenseWeight | None:
        """Return the weight if its products with this number of rows should be fused with the ops around them; else
        None.
        """
        weight = self._weight
        if self._collectives is not None or not isinstance(weight, DenseWeight):
            return None
        return weight if weight.fuses(rows, gate) else None

    def input_from(self, op: Callable[..., Tensor], *args: Any, **kwargs: Any) -> LinearInput:
        """Return the result of an op in the form that this layer multiplies; see `LinearWeight.input_from`."""
        return self._weight.input_from(op, *args, **kwargs)

    def weight_slots(self) -> Iterator[WeightSlot]:
        """Yield the slots of every part."""
        yield from self._slots
