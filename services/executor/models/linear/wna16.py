"""Weights of 4 and 8 bit integers in groups that share a scale, multiplied with inputs of full precision."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from scalellm.kernels import WNA16_INTERLEAVE
from scalellm.kernels.cpu.gemm_wna16 import TiledWeight
from scalellm.services.executor.models.linear.packing import interleave_rows_, pack_rows, per_word, unpack_rows
from scalellm.services.executor.models.linear.quantised import LinearInput
from scalellm.services.executor.models.runtime import ModelRuntime

Bits = Literal[4, 8]


def quantise_groups(matrix: Tensor, bits: Bits, group_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return (words `[K * bits / 32, n]` i32, scales `[K / group_size, n]`) of `matrix [n, K]`, without zero points.

    The number of largest magnitude in a group becomes -2^(bits - 1), the end of the range that is one step longer, so
    a scale may be negative. Numbers are rounded with regard to the scale as it is stored, in `dtype`.
    """
    half = 1 << (bits - 1)
    groups = matrix.float().view(matrix.shape[0], -1, group_size)
    least, most = groups.aminmax(dim=-1, keepdim=True)
    scales = (torch.where(most > -least, most, least) / -half).to(dtype)
    divisor = torch.where(scales == 0, 1.0, scales.float())
    numbers = (groups / divisor).round_().add_(half).clamp_(0, 2 * half - 1).to(torch.uint8)
    return pack_rows(numbers.flatten(1).T, bits), scales.squeeze(-1).T


def quantise_groups_with_zeros(
    matrix: Tensor, bits: Bits, group_size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (words, scales, zero points) of `matrix [n, K]`, shapes as in `quantise_groups`.

    Numbers 0 and 2^bits - 1 are the least and the largest of a group. So blocks that were quantised like this before
    (GGUF's Q4_1) come out as they were, where groups are no larger. Zero points need not be whole.
    """
    highest = (1 << bits) - 1
    groups = matrix.float().view(matrix.shape[0], -1, group_size)
    least, most = groups.aminmax(dim=-1, keepdim=True)
    scales = ((most - least) / highest).to(dtype)
    # A group of equal numbers: each is one step from the zero point.
    scales = torch.where(scales == 0, torch.where(least == 0, 1.0, -least).to(dtype), scales)
    zeros = (-least / scales.float()).to(dtype)
    numbers = (groups / scales.float() + zeros.float()).round_().clamp_(0, highest).to(torch.uint8)
    return pack_rows(numbers.flatten(1).T, bits), scales.squeeze(-1).T, zeros.squeeze(-1).T


class IntWeight:
    """words `[K * bits / 32, N]` i32; scales and, optionally, zero points `[K / group_size, N]` of the runtime's dtype.

    Number q stands for `(q - zero) * scale`; zero is 2^(bits - 1) where no zero points are kept. With `ordered`, row i
    of the matrix that the words hold, and so a member of group i / group_size, belongs to input `order[i]`.
    """

    def __init__(
        self,
        rows: int,
        columns: int,
        runtime: ModelRuntime,
        *,
        bits: Bits,
        group_size: int,
        zeros: bool = False,
        ordered: bool = False,
    ) -> None:
        self.bits: Bits = bits
        self.group_size = group_size
        self._dtype = runtime.dtype
        self._gemm = runtime.ops.w4a16_gemm if bits == 4 else runtime.ops.w8a16_gemm
        backend = runtime.ops.backends["w4a16_gemm" if bits == 4 else "w8a16_gemm"]
        self._library = runtime.ops.library if backend == "cpp" else None
        self._tiled: TiledWeight | None = None
        self._interleave = 1
        self._best_interleave = WNA16_INTERLEAVE if backend == "triton" else 1
        self.words = runtime.empty(columns // per_word(bits), rows, dtype=torch.int32)
        self.scales = runtime.empty(columns // group_size, rows)
        self.zeros = runtime.empty(columns // group_size, rows) if zeros else None
        self.order = runtime.empty(columns, dtype=torch.int32) if ordered else None

    def part(self, rows: slice | Tensor) -> tuple[Tensor, ...]:
        """Return the words, scales and, if there are, zero points of some rows."""
        tensors = (self.words, self.scales) if self.zeros is None else (self.words, self.scales, self.zeros)
        return tuple(tensor[:, rows] for tensor in tensors)

    def encode(self, matrix: Tensor) -> Sequence[Tensor]:
        """Return the words, scales and, if there are, zero points of a full-precision matrix."""
        quantise = quantise_groups if self.zeros is None else quantise_groups_with_zeros
        return quantise(matrix, self.bits, self.group_size, self._dtype)

    def finish(self) -> None:
        """Put the words into the order in which Triton multiplies them, or all parts into that of C++.

        From then on they are no longer to be read or written here. A weight whose inputs cannot be interleaved is left
        as it is, and multiplied more slowly.
        """
        if self._interleave != self._best_interleave and self.words.shape[0] % self._best_interleave == 0:
            interleave_rows_(self.words, self.bits, self._best_interleave)
            self._interleave = self._best_interleave
        if self._tiled is not None or self._library is None:
            return
        if TiledWeight.takes(self.scales, bits=self.bits, group_size=self.group_size):
            self._tiled = TiledWeight(
                self._library, self.words, self.scales, self.zeros, bits=self.bits, group_size=self.group_size
            )

    def rows(self, indices: Tensor, *, scale: float = 1.0) -> Tensor:
        """Return rows `[n, K]` of W, times `scale`, in the runtime's dtype; not for an ordered weight."""
        if self._tiled is not None:
            return self._tiled.columns(indices, scale=scale)
        words, scales, *zeros = self.part(indices)
        numbers = unpack_rows(words, self.bits)
        if self._interleave > 1:
            blocks = torch.unflatten(numbers, 0, (-1, self._interleave, per_word(self.bits)))
            numbers = blocks.transpose(1, 2).flatten(0, 2)
        numbers = torch.unflatten(numbers, 0, (-1, self.group_size))
        middle = zeros[0].unsqueeze(1) if zeros else 1 << (self.bits - 1)
        columns: Tensor = (numbers.to(self._dtype) - middle) * scales.unsqueeze(1)
        return columns.flatten(0, 1).T.contiguous().mul_(scale)

    def product(self, x: LinearInput, bias: Tensor | None, *, out: Tensor | None = None) -> Tensor:
        """Return `x W^T + bias`, in `out` where it is given."""
        assert isinstance(x, Tensor)
        x = x if self.order is None else x.index_select(1, self.order)
        if self._tiled is not None:
            y = self._tiled.product(x, out=out)
        else:
            form: dict[str, Any] = {"group_size": self.group_size, "interleave": self._interleave}
            y = self._gemm(x, self.words, self.scales, self.zeros, **form, out=out)
        return y if bias is None else y.add_(bias)

    def input_from(self, op: Callable[..., Tensor], *args: Any, **kwargs: Any) -> LinearInput:
        """Call the op."""
        return op(*args, **kwargs)
