"""`fused_linear`: y = f(x') W^T + b, or y = act(gate) * up of its halves, or h + that, of x [T, K] and W [N, K].

x' is x, or its RMS norm by sums of squares that are given (Zhang and Sennrich 2019); act is SiLU or GELU's tanh form
(Shazeer 2020). As in transformers' decoder layers, the normed row, the product, the activation and the sum are rounded.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from scalellm.kernels.dispatch import Ops
from scalellm.kernels.reference.linear import SQUARED_TOGETHER, Gate, RowNorm, num_squares
from scalellm.kernels.spec.case import BF16, FP16, Bound, Case, Maker, Spec, name_of
from scalellm.kernels.spec.norm import rms_norm

_TOLERANCE = {BF16: 1e-2, FP16: 1.2e-3}  # up to four roundings, two of them of operands of the product
_EPS = 1e-5


def squares_of(x: Tensor) -> Tensor:
    """Return the sums of squares of 32 numbers of a row each, [T, ceil(K / 32)], in float64."""
    padded = F.pad(x.double(), (0, -x.shape[1] % SQUARED_TOGETHER))
    return torch.unflatten(padded.square(), 1, (-1, SQUARED_TOGETHER)).sum(-1)


def _linear(
    rows: int,
    inner: int,
    columns: int,
    *,
    dtype: torch.dtype = BF16,
    norm: bool = False,
    gemma: bool = False,
    gate: Gate | None = None,
    adds: bool = False,
    bias: bool = False,
) -> Case:
    def bind(ops: Ops, make: Maker) -> Bound:
        # Of the size of a residual stream, whose norm is of order 1; so are products.
        x = make.randn(rows, inner, dtype=dtype, scale=20.0 if norm else 1.0)
        weight = make.randn((1 if gate is None else 2) * columns, inner, dtype=dtype, scale=inner**-0.5)
        offset = make.randn(weight.shape[0], dtype=dtype) if bias else None
        norm_weight = make.randn(inner, dtype=dtype)
        out = make.randn(rows, columns, dtype=dtype) if adds else make.poison(rows, columns, dtype=dtype)
        results = {"out": out}
        options: dict[str, Any] = {}
        if norm:
            squares = make.poison(rows, num_squares(inner))
            if x.device.type != "meta":
                squares.copy_(squares_of(x))
            options["norm"] = RowNorm(squares, norm_weight, _EPS, gemma)
        if adds:
            results["squares"] = make.poison(rows, num_squares(columns))
            options |= {"residual": out, "squares": results["squares"]}
        else:
            options["out"] = out

        def expected() -> dict[str, Tensor]:
            left = rms_norm(x.double(), norm_weight, _EPS, gemma) if norm else x.double()
            y = left @ weight.double().T
            if offset is not None:
                y += offset.double()
            if gate is not None:
                first, second = y.chunk(2, -1)
                y = (F.silu(first) if gate == "silu" else F.gelu(first, approximate="tanh")) * second
            if adds:
                y += out.double()
                return {"out": y, "squares": squares_of(y)}
            return {"out": y}

        return Bound(lambda: ops.fused_linear(x, weight, offset, gate=gate, **options), results, expected)

    marks = [name_of(dtype)]
    if norm:
        marks.append("gemma norm" if gemma else "norm")
    marks += [gate] if gate else []
    marks += ["added"] if adds else []
    marks += ["bias"] if bias else []
    return Case("fused_linear", f"{rows}x{inner}x{columns} {' '.join(marks)}", bind, dtype, tolerance=_TOLERANCE[dtype])


SPEC = Spec(
    small=(
        # Neither dimension is divided by tiles, rows fill none or all of one.
        *(_linear(rows, 72, 40, dtype=dtype) for rows in (1, 16) for dtype in (BF16, FP16)),
        *(_linear(3, 72, 40, dtype=dtype, norm=True, bias=True) for dtype in (BF16, FP16)),
        _linear(3, 520, 64, norm=True, gemma=True),
        *(_linear(3, 72, 40, norm=True, gate=gate, bias=gate == "silu") for gate in ("silu", "gelu_tanh")),
        _linear(5, 256, 32, gate="silu"),
        *(_linear(3, 520, 72, dtype=dtype, adds=True) for dtype in (BF16, FP16)),
        _linear(16, 64, 40, adds=True, bias=True),
    ),
    served=(  # Llama 3.1 8B, which Qwen3 8B and Mixtral share the shapes of attention with; SmolLM2 135M; Gemma 3 270M
        _linear(1, 4096, 6144, norm=True),
        _linear(16, 4096, 4096, adds=True),
        _linear(8, 4096, 14336, norm=True, gate="silu"),
        _linear(8, 14336, 4096, adds=True),
        _linear(8, 4096, 4608, norm=True, bias=True),  # Qwen2.5 7B has a bias
        _linear(4, 576, 960, norm=True),
        _linear(4, 576, 576, adds=True),
        _linear(4, 576, 1536, norm=True, gate="silu"),
        _linear(4, 1536, 576, adds=True),
        _linear(4, 640, 2048, gate="gelu_tanh"),
    ),
    large=(
        _linear(16, 4096, 6144, dtype=FP16, norm=True),
        _linear(16, 4096, 14336, dtype=FP16, norm=True, gate="silu"),
        _linear(5, 1000, 1000, norm=True, gemma=True),
        _linear(16, 8192, 8192, adds=True),
    ),
)
