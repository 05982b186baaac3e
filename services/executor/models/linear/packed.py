"""Projections of one input, stacked into one matrix."""

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from scalellm.services.executor.models.linear.checkpoint import CheckpointFormat, bias_slots, build_weight
from scalellm.services.executor.models.linear.quantised import LinearInput
from scalellm.services.executor.models.runtime import ModelRuntime
from scalellm.services.executor.models.weight_slot import WeightSlot, finish_with


class PackedLinear:
    """y = x W^T + b, where W stacks the rows of one or more projections.

    `parts` maps their names under `prefix` to output sizes; `stored` is how the checkpoint has them, if quantised.
    """

    def __init__(
        self,
        prefix: str,
        in_features: int,
        parts: dict[str, int],
        *,
        bias: bool,
        stored: CheckpointFormat | None,
        runtime: ModelRuntime,
    ) -> None:
        names = {f"{prefix}.{part}": size for part, size in parts.items()}
        self._weight, self._slots = build_weight(names, in_features, stored, runtime)
        self._bias = runtime.empty(sum(parts.values())) if bias else None
        finish_with(self._weight.finish, self._slots)
        self._slots += bias_slots(names, self._bias, stored)

    def __call__(self, x: LinearInput) -> Tensor:
        """`[T, in]` -> `[T, out]`."""
        return self._weight.product(x, self._bias)

    def input_from(self, op: Callable[..., Tensor], *args: Any, **kwargs: Any) -> LinearInput:
        """Return the result of an op in the form that this layer multiplies; see `LinearWeight.input_from`."""
        return self._weight.input_from(op, *args, **kwargs)

    def weight_slots(self) -> Iterator[WeightSlot]:
        """Yield the slots of every part."""
        yield from self._slots
