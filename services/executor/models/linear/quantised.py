"""Inputs and results of a linear layer, and the interface of its weight."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from scalellm.kernels import RowNorm


class QuantisedInput(NamedTuple):
    """`codes [T, K]` e4m3 with `scale`, one element or `[T, 1]` f32: the product of the two is the input."""

    codes: Tensor
    scale: Tensor


class NormedInput(NamedTuple):
    """The norm of `hidden [T, K]`, which a product computes on its way; see `PackedLinear.norms_inputs`."""

    hidden: Tensor
    norm: RowNorm


LinearInput = Tensor | QuantisedInput | NormedInput


class Added(NamedTuple):
    """A result that is in the residual stream already; `squares` are those of the stream (`kernels.RowNorm`)."""

    squares: Tensor


ToAdd = Tensor | Added
"""Output of a block of a decoder layer for the residual stream `[T, H]`: the next norm adds it, or it is `Added`."""


class LinearWeight(Protocol):
    """The memory of a weight `[N, K]` in one of the forms that there are ops for, and the product with it."""

    def part(self, rows: slice) -> tuple[Tensor, ...]:
        """Return the memory of some of the N rows."""

    def encode(self, matrix: Tensor) -> Sequence[Tensor]:
        """Convert full-precision rows `matrix [n, K]` to the tensors that `part` returns for them."""

    def finish(self) -> None:
        """Prepare the weight for products, once all its parts are filled. Not called if another op multiplies the
        weight.
        """

    def product(self, x: LinearInput, bias: Tensor | None) -> Tensor:
        """Return `x W^T + bias`, `[T, N]`; a quantised `x` is one that `input_from` made."""

    def input_from(self, op: Callable[..., Tensor], *args: Any, **kwargs: Any) -> LinearInput:
        """Call the op that computes the input, with the quantisation of its result as its epilogue if that can be.

        `op` takes `quant_scale`, `token_scale` and `ahead` as `kernels.silu_and_mul` does, and has T rows in its first
        argument.
        """
