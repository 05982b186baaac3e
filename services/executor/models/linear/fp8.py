"""Weights of e4m3 numbers, multiplied with inputs of e4m3 numbers."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from scalellm.kernels import scaled_fp8_quant
from scalellm.services.executor.models.linear.quantised import LinearInput, QuantisedInput
from scalellm.services.executor.models.runtime import ModelRuntime

E4M3 = torch.float8_e4m3fn
_E4M3_MAX = 448.0
_MIN_SCALE = 1e-12  # of a matrix of zeros

Granularity = Literal["row", "tensor"]


def quantise_e4m3(matrix: Tensor, granularity: Granularity = "row") -> tuple[Tensor, Tensor]:
    """Return (codes `[n, K]` e4m3, scales `[n, 1]` f32) of a matrix, one scale per row or the same for all rows."""
    if granularity == "row":
        return scaled_fp8_quant(matrix)
    scale = (matrix.abs().amax().float() / _E4M3_MAX).clamp_(min=_MIN_SCALE)
    return scaled_fp8_quant(matrix, scale)[0], scale.expand(matrix.shape[0], 1)


class Fp8Weight:
    """codes `[N, K]` e4m3 and scale, `[N, 1]` or one per block, `[N / bn, K / bk]`, f32.

    Scales of a whole matrix are kept per row, too: matrices that are stacked have one each. Inputs are quantised per
    token when the product is computed; with blocks, per bk columns of a token, as such weights were made for; with
    static_input, by one stored scale.
    """

    def __init__(
        self,
        rows: int,
        columns: int,
        runtime: ModelRuntime,
        *,
        granularity: Granularity = "row",
        block: tuple[int, int] | None = None,
        static_input: bool = False,
    ) -> None:
        self._ops = runtime.ops
        self._dtype = runtime.dtype
        self._fast_sums = runtime.fp8_fast_sums
        self._granularity: Granularity = granularity
        self._group_size = None if block is None else block[1]
        self.codes = runtime.empty(rows, columns, dtype=E4M3)
        shape = (rows, 1) if block is None else (rows // block[0], columns // block[1])
        self.scale = runtime.empty(*shape, dtype=torch.float32)
        self.input_scale = runtime.empty(1, dtype=torch.float32) if static_input else None

    def part(self, rows: slice) -> tuple[Tensor, ...]:
        """Return the codes and scales of some rows; not for scales of blocks."""
        return self.codes[rows], self.scale[rows]

    def encode(self, matrix: Tensor) -> Sequence[Tensor]:
        """Return the codes and scales of a full-precision matrix."""
        return quantise_e4m3(matrix, self._granularity)

    def finish(self) -> None:
        """Do nothing: the weight needs no preparation."""

    def product(self, x: LinearInput, bias: Tensor | None) -> Tensor:
        """Return `x W^T + bias`, in the runtime's dtype."""
        if isinstance(x, QuantisedInput):
            codes, scale = x
        else:
            assert isinstance(x, Tensor)
            codes, scale = self._ops.scaled_fp8_quant(
                x, self.input_scale, group_size=self._group_size, ahead=self.codes
            )
        form: dict[str, Any] = {"out_dtype": self._dtype, "fast_sums": self._fast_sums}
        return self._ops.fp8_gemm(codes, self.codes, scale, self.scale, bias=bias, **form)

    def input_from(self, op: Callable[..., Tensor], *args: Any, **kwargs: Any) -> LinearInput:
        """Call the op with the quantisation as its epilogue; no op has one for groups of columns."""
        if self._group_size is not None:
            return op(*args, **kwargs)
        kwargs["ahead"] = self.codes
        if self.input_scale is not None:
            return QuantisedInput(op(*args, **kwargs, quant_scale=self.input_scale), self.input_scale)
        first: Tensor = args[0]
        token_scale = torch.empty((first.shape[0], 1), dtype=torch.float32, device=first.device)
        return QuantisedInput(op(*args, **kwargs, token_scale=token_scale), token_scale)
