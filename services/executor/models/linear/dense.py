"""Weights that are not quantised."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from services.executor.models.linear.quantised import LinearInput
from services.executor.models.runtime import ModelRuntime


class DenseWeight:
    """A weight `[N, K]` of the runtime's dtype."""

    def __init__(self, rows: int, columns: int, runtime: ModelRuntime) -> None:
        self.weight = runtime.empty(rows, columns)

    def part(self, rows: slice) -> tuple[Tensor, ...]:
        """Return some of the rows."""
        return (self.weight[rows],)

    def encode(self, matrix: Tensor) -> tuple[Tensor, ...]:
        """Return the matrix."""
        return (matrix,)

    def finish(self) -> None:
        """Do nothing: it is ready."""

    def product(self, x: LinearInput, bias: Tensor | None) -> Tensor:
        """Return `x W^T + bias`."""
        assert isinstance(x, Tensor)
        return F.linear(x, self.weight, bias)

    def input_from(self, op: Callable[..., Tensor], *args: Any, **kwargs: Any) -> LinearInput:
        """Call the op."""
        return op(*args, **kwargs)
