"""A product with a weight, the norm before it, and the activation or the addition after it, as one op."""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from scalellm.kernels.reference.activation import gelu_tanh_and_mul, silu_and_mul
from scalellm.kernels.reference.norm import scaled_by_norm

SQUARED_TOGETHER = 32  # numbers of a row whose squares are added up in one sum

Gate = Literal["silu", "gelu_tanh"]


class RowNorm(NamedTuple):
    """The RMSNorm of rows [T, K] whose squares have been added up already.

    Attributes:
        squares: [T, ceil(K / 32)] f32, sums of the squares of 32 numbers of a row each.
        weight: [K]. The Gemma form multiplies by `1 + weight`.
        eps: added to the mean square.
        gemma: chooses the Gemma form; see `rms_norm`.
    """

    squares: Tensor
    weight: Tensor
    eps: float
    gemma: bool


def num_squares(columns: int) -> int:
    """Return how many sums of squares a row of so many numbers has."""
    return -(-columns // SQUARED_TOGETHER)


def check_fused(gate: Gate | None, residual: Tensor | None, squares: Tensor | None, out: Tensor | None) -> None:
    """Refuse options that exclude each other.

    Raises:
        ValueError: the result is to be activated and added, or written to two places, or has no row to be squared.
    """
    if residual is not None and (gate is not None or out is not None):
        raise ValueError("residual: not possible together with gate or out")
    if squares is not None and residual is None:
        raise ValueError("squares: only of a residual")


def fused_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: RowNorm | None = None,
    gate: Gate | None = None,
    residual: Tensor | None = None,
    squares: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Return `x @ weight.T + bias`, [T, N], with what is before and after it in a decoder layer.

    Numbers are rounded to the dtype of `x` wherever the separate ops round them: the normed row, the product, the
    activated gate, the sum. So the result differs from theirs by the order of sums alone.

    Args:
        x: [T, K].
        weight: [N, K], or [2N, K] with a gate: the rows of the gate first, then those of what it is multiplied with.
        bias: [N], or [2N] with a gate.
        norm: multiply the norm of `x` instead of `x`.
        gate: return `activation(y[:, :N]) * y[:, N:]` of the product y, as `silu_and_mul` or `gelu_tanh_and_mul`.
        residual: [T, N], to which the product is added in place; it is returned.
        squares: [T, ceil(N / 32)] f32, receives the sums of squares of the new residual that its norm needs.
        out: [T, N], receives the result.

    Raises:
        ValueError: options exclude each other; see `check_fused`.
    """
    check_fused(gate, residual, squares, out)
    if norm is not None:
        rstd = torch.rsqrt(norm.squares.sum(-1, keepdim=True) / x.shape[1] + norm.eps)
        x = scaled_by_norm(x, rstd, norm.weight, gemma=norm.gemma)
    y = F.linear(x, weight, bias)
    if gate is not None:
        return (silu_and_mul if gate == "silu" else gelu_tanh_and_mul)(y, out=out)
    if residual is None:
        return y if out is None else out.copy_(y)
    residual.add_(y)
    if squares is not None:
        padded = F.pad(residual.float(), (0, -residual.shape[1] % SQUARED_TOGETHER))
        squares.copy_(torch.unflatten(padded.square(), 1, (-1, SQUARED_TOGETHER)).sum(-1))
    return residual
