"""`scaled_fp8_quant`: q = e4m3(clamp(x / s, -448, 448)), with s = max(|x|) / 448 of each row, or group of a row.

Of x [T, K]; s is [T, 1] or [T, K / group], or one scale that is given (Micikevicius et al. 2022; groups of 128 are
DeepSeek-V3's).
"""

from __future__ import annotations

import torch
from torch import Tensor

from scalellm.kernels.dispatch import Ops
from scalellm.kernels.spec.case import BF16, E4M3, FLOATS, FP32, Bound, Case, Maker, Spec, name_of

_E4M3_MAX = 448.0


def codes(x: Tensor, scale: float | Tensor) -> Tensor:
    """Return x / scale as e4m3, clamped."""
    return (x.float() / scale).clamp(-_E4M3_MAX, _E4M3_MAX).to(E4M3)


def token_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes, and the scale [..., 1] that each last dimension gets."""
    scale = (x.float().abs().amax(-1, keepdim=True) / _E4M3_MAX).clamp(min=1e-12)
    return codes(x, scale), scale


def _quant(
    rows: int,
    width: int,
    *,
    dtype: torch.dtype = BF16,
    group_size: int | None = None,
    static: bool = False,
    ahead: bool = False,
) -> Case:
    """`ahead`: a weight is named that is multiplied next."""

    def bind(ops: Ops, make: Maker) -> Bound:
        x = make.randn(rows, width, dtype=dtype, scale=30.0)
        x[rows // 2] = 0
        q, s = make.poison(rows, width, dtype=E4M3), make.poison(rows, width // (group_size or width))
        scale = make.tensor([0.05], FP32) if static else None
        if scale is not None:
            s = scale.clone()
        weight = make.poison(64, width, dtype=E4M3) if ahead else None

        def expected() -> dict[str, Tensor]:
            if scale is not None:
                return {"q": codes(x, scale), "s": scale}
            quantised, found = token_codes(x.view(rows, -1, group_size or width))
            return {"q": quantised.view(rows, width), "s": found.squeeze(-1)}

        def run() -> object:
            return ops.scaled_fp8_quant(x, scale, group_size=group_size, ahead=weight, out=(q, s))

        return Bound(run, {"q": q, "s": s}, expected)

    kind = "static" if static else f"groups of {group_size}" if group_size else "tokens"
    name = f"{rows}x{width} {name_of(dtype)} {kind}{' before a product' if ahead else ''}"
    return Case("scaled_fp8_quant", name, bind, dtype, min_sm=89, tolerance=1e-6)


SPEC = Spec(
    small=(
        *(
            _quant(4, width, dtype=dtype, group_size=group)
            for width in (192, 1152)
            for group in (None, 16, 64, 48)
            for dtype in FLOATS
        ),
        *(_quant(3, width, dtype=FP32, static=True) for width in (8, 1500)),
        _quant(17, 64, ahead=True),
    ),
    served=(
        _quant(64, 4096, ahead=True),  # Llama 3.1 8B
        _quant(64, 14336, ahead=True),
        _quant(64, 4096, group_size=128, ahead=True),
    ),
    large=(
        _quant(300, 4096),
        _quant(1, 14336),
        _quant(300, 4096, group_size=128),
        _quant(300, 4096, static=True),
    ),
)
