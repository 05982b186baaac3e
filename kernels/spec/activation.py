"""`silu_and_mul` and `gelu_tanh_and_mul`: y = f(gate) * up, of x = [gate, up], [T, 2F].

f(g) = g / (1 + exp(-g)) (SwiGLU, Shazeer 2020), or the tanh approximation of GELU (Gemma's GeGLU). f(gate) is rounded
to the dtype of x, as in transformers. With a scale, y is stored as e4m3.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from scalellm.kernels.dispatch import Ops
from scalellm.kernels.spec.case import BF16, E4M3, FLOATS, FP16, FP32, Bound, Case, Maker, Spec, name_of
from scalellm.kernels.spec.quant import codes, token_codes

_SILU, _GELU = "silu_and_mul", "gelu_tanh_and_mul"
# Two roundings; of float32, what is left of 1 + tanh(g) where g is far below 0.
_TOLERANCE = {FP32: 4e-6, BF16: 5e-3, FP16: 6e-4}
_SCALE = 0.5
_EXTREMES = (-1e4, -100.0, -20.0, -0.0, 0.0, 20.0, 100.0, 1e4)


def _gated(
    op: str,
    rows: int,
    width: int,
    *,
    dtype: torch.dtype = BF16,
    epilogue: str = "",
    extreme: bool = False,
    ahead: torch.dtype | None = None,
) -> Case:
    """`epilogue`: "" or "static", one scale that is given, or "tokens", a scale computed for each row.

    `ahead` is the dtype of a weight that is multiplied next.
    """

    def gate(x: Tensor) -> Tensor:
        return F.silu(x) if op == _SILU else F.gelu(x, approximate="tanh")

    def bind(ops: Ops, make: Maker) -> Bound:
        # Beyond +-448 where codes are to be clamped.
        spread = 40.0 if epilogue == "static" else 4.0 if width > 1 else 1.0
        x = make.randn(rows, 2 * width, dtype=dtype, scale=spread)
        if extreme:
            x[:, :8], x[:, width:] = make.tensor(_EXTREMES, dtype), 1.0
        out = make.poison(rows, width, dtype=E4M3 if epilogue else dtype)
        results: dict[str, Tensor] = {"out": out}
        options: dict[str, Any] = {}
        if epilogue == "static":
            options["quant_scale"] = make.tensor([_SCALE], FP32)
        elif epilogue:
            options["token_scale"] = results["token_scale"] = make.poison(rows, 1)
        if ahead is not None:
            options["ahead"] = make.poison(64, width, dtype=ahead)

        def expected() -> dict[str, Tensor]:
            first, second = x.double().chunk(2, -1)
            if not epilogue:
                return {"out": gate(first) * second}
            first, second = x.float().chunk(2, -1)
            if epilogue == "static":
                return {"out": codes(gate(first).to(dtype).float() * second, _SCALE)}
            quantised, scale = token_codes(gate(first).to(dtype) * second.to(dtype))
            return {"out": quantised, "token_scale": scale}

        return Bound(lambda: getattr(ops, op)(x, out=out, **options), results, expected)

    marks = [name_of(dtype), epilogue, "extreme gates" if extreme else "", f"before {name_of(ahead)}" if ahead else ""]
    name = f"{rows}x{width} {' '.join(mark for mark in marks if mark)}"
    tolerance = 1.5e-2 if epilogue else _TOLERANCE[dtype]
    return Case(op, name, bind, dtype, min_sm=89 if epilogue else 80, tolerance=tolerance)


SPEC = Spec(
    small=(
        *(
            _gated(op, 3, width, dtype=dtype)
            for op in (_SILU, _GELU)
            for width in (24, 1, 1024, 1500)
            for dtype in FLOATS
        ),
        *(_gated(op, 2, 8, dtype=FP32, extreme=True) for op in (_SILU, _GELU)),
        *(_gated(op, 3, 64, epilogue="static") for op in (_SILU, _GELU)),
        _gated(_SILU, 17, 24, ahead=BF16),
        *(
            _gated(op, 4, width, dtype=dtype, epilogue="tokens")
            for op in (_SILU, _GELU)
            for width in (64, 1, 1500)
            for dtype in FLOATS
        ),
    ),
    served=(
        _gated(_SILU, 64, 14336),  # Mixtral 8x7B
        _gated(_SILU, 64, 14336, ahead=BF16),  # Llama 3.1 8B
        _gated(_SILU, 64, 14336, epilogue="static", ahead=E4M3),
        _gated(_SILU, 64, 14336, epilogue="tokens", ahead=E4M3),
        _gated(_SILU, 64, 28672, epilogue="tokens", ahead=E4M3),  # Llama 3.1 70B
        _gated(_SILU, 64, 12288, ahead=BF16),  # Qwen3 8B
        _gated(_SILU, 64, 1536, ahead=BF16),  # SmolLM2 135M
        _gated(_GELU, 64, 2048, ahead=BF16),  # Gemma 3 270M
        _gated(_GELU, 64, 2048, epilogue="static", ahead=E4M3),
        _gated(_GELU, 64, 2048, epilogue="tokens", ahead=E4M3),
    ),
    large=(
        *(_gated(_SILU, 300, 14336, dtype=dtype) for dtype in (BF16, FP16, FP32)),
        _gated(_SILU, 7, 1500),
        _gated(_SILU, 1, 28672),
        _gated(_GELU, 7, 2048, epilogue="tokens"),
    ),
)
