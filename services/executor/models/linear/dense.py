"""Weights that are not quantised."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from scalellm.kernels import Gate, num_squares
from scalellm.kernels.cpu.gemm_dense import TiledMatrix
from scalellm.services.executor.models.linear.quantised import Added, LinearInput, NormedInput
from scalellm.services.executor.models.runtime import ModelRuntime


class DenseWeight:
    """A weight `[N, K]` of the runtime's dtype, or of `dtype` where C++ multiplies it.

    On a CPU with C++ forms and float32 activations, `finish` puts the weight into the order in which C++ reads it;
    `weight` is not to be read or written from then on.
    """

    def __init__(self, rows: int, columns: int, runtime: ModelRuntime, *, dtype: torch.dtype | None = None) -> None:
        self.weight = runtime.empty(rows, columns, dtype=dtype)
        self._ops = runtime.ops
        self._library = runtime.ops.library if self.is_multiplied_in_cpp(runtime) else None
        self._tiled: TiledMatrix | None = None

    @staticmethod
    def is_multiplied_in_cpp(runtime: ModelRuntime) -> bool:
        """Return whether C++ multiplies the weights of a runtime, so that a weight may have a dtype of its own."""
        return runtime.ops.library is not None and runtime.dtype == torch.float32

    def part(self, rows: slice) -> tuple[Tensor, ...]:
        """Return some of the rows."""
        return (self.weight[rows],)

    def encode(self, matrix: Tensor) -> tuple[Tensor, ...]:
        """Return the matrix."""
        return (matrix,)

    def finish(self) -> None:
        """Put the weight into the order in which C++ multiplies it, if C++ does."""
        if self._library is not None and self._tiled is None:
            self._tiled = TiledMatrix(self._library, self.weight)

    def rows(self, indices: Tensor, *, scale: float = 1.0) -> Tensor:
        """Return rows `[n, K]` of W, times `scale`, in the runtime's dtype."""
        if self._tiled is not None:
            return self._tiled.rows(indices, scale=scale)
        rows = F.embedding(indices, self.weight)
        return rows if scale == 1.0 else rows.mul_(scale)

    def product(self, x: LinearInput, bias: Tensor | None, *, out: Tensor | None = None) -> Tensor:
        """Return `x W^T + bias`, in `out` where it is given."""
        if isinstance(x, NormedInput):
            return self._ops.fused_linear(x.hidden, self.weight, bias, norm=x.norm, out=out)
        assert isinstance(x, Tensor)
        if self._tiled is not None:
            return self._tiled.product(x, bias, out=out)
        y = F.linear(x, self.weight, bias)
        return y if out is None else out.copy_(y)

    def fuses(self, rows: int, gate: Gate | None = None) -> bool:
        """True if products with this number of rows take normed inputs, and should be `gated` with this gate, or
        `added`.
        """
        return self._ops.takes_fused(rows, gate)

    def gated(self, x: Tensor | NormedInput, bias: Tensor | None, gate: Gate) -> Tensor:
        """Return `activation(y[:, :N / 2]) * y[:, N / 2:]` of the product y, `[T, N / 2]`, where it `fuses`."""
        hidden, norm = x if isinstance(x, NormedInput) else (x, None)
        return self._ops.fused_linear(hidden, self.weight, bias, norm=norm, gate=gate)

    def added(self, x: Tensor, bias: Tensor | None, residual: Tensor) -> Added:
        """Add the product to `residual [T, N]` in place, where it `fuses`."""
        rows, columns = residual.shape
        squares = torch.empty((rows, num_squares(columns)), dtype=torch.float32, device=residual.device)
        self._ops.fused_linear(x, self.weight, bias, residual=residual, squares=squares)
        return Added(squares)

    def input_from(self, op: Callable[..., Tensor], *args: Any, **kwargs: Any) -> LinearInput:
        """Call the op."""
        return op(*args, **kwargs, ahead=self.weight)
