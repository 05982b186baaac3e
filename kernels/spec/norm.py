"""`fused_add_rms_norm`: h = x + residual, y = h / sqrt(mean(h^2) + eps) * w.

Of x [T, H] and w [H]; Gemma multiplies by 1 + w (Zhang and Sennrich 2019; the points of rounding are transformers'
`LlamaRMSNorm` and `Gemma3RMSNorm`). h is rounded to the dtype of the residual. With a scale, y is stored as e4m3.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from scalellm.kernels.dispatch import Ops
from scalellm.kernels.spec.case import BF16, E4M3, FLOATS, FP16, FP32, Bound, Case, Maker, Spec, name_of
from scalellm.kernels.spec.quant import codes, token_codes

_TOLERANCE = {FP32: 1e-6, BF16: 5e-3, FP16: 6e-4}  # two roundings, of the normalised row and of its product
_EPS = 1e-5


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, gemma: bool) -> Tensor:
    """Return the norm over the last dimension in float64; without a weight, x as it is."""
    if weight is None:
        return x
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (weight.double() + gemma)


def _norm(
    rows: int,
    width: int,
    *,
    dtype: torch.dtype = BF16,
    residual: bool = True,
    gemma: bool = False,
    epilogue: str = "",
    spread: float = 1.0,
    ahead: torch.dtype | None = None,
) -> Case:
    """`epilogue`: "" or "static", one scale that is given, or "tokens", a scale computed for each row.

    `spread` is the size of weights: of large ones, codes of a static scale are clamped. `ahead` is the dtype of a
    weight that is multiplied next.
    """

    def bind(ops: Ops, make: Maker) -> Bound:
        x, weight = make.randn(rows, width, dtype=dtype), make.randn(width, dtype=dtype, scale=spread)
        stream = make.randn(rows, width, dtype=dtype) if residual else None
        out = make.poison(rows, width, dtype=E4M3 if epilogue else dtype)
        before = x.clone()
        results: dict[str, Tensor] = {"out": out, "x": x}
        options: dict[str, Any] = {}
        if stream is not None:
            results["residual"] = stream
        if epilogue == "static":
            options["quant_scale"] = make.tensor([0.01], FP32)
        elif epilogue == "tokens":
            options["token_scale"] = results["token_scale"] = make.poison(rows, 1)
        if ahead is not None:
            options["ahead"] = make.poison(width, width, dtype=ahead)

        def expected() -> dict[str, Tensor]:
            hidden = x if stream is None else stream + x
            found = {"residual": hidden, "x": before, "out": rms_norm(hidden.double(), weight, _EPS, gemma)}
            if epilogue:  # the codes are of the rounded row
                normed = F.rms_norm(hidden.float(), [width], None, _EPS)
                rounded = (normed * (weight.float() + 1)).to(dtype) if gemma else normed.to(dtype) * weight
                of_tokens, scale = token_codes(rounded)
                found |= {"out": of_tokens if epilogue == "tokens" else codes(rounded, 0.01), "token_scale": scale}
            return found

        def run() -> object:
            return ops.fused_add_rms_norm(x, stream, weight, _EPS, gemma=gemma, out=out, **options)

        return Bound(run, results, expected)

    marks = [name_of(dtype), *(["gemma"] if gemma else []), *([] if residual else ["first"]), epilogue]
    if spread != 1:
        marks.append("clamped")
    if ahead is not None:
        marks.append(f"before {name_of(ahead)}")
    return Case(
        "fused_add_rms_norm",
        f"{rows}x{width} {' '.join(mark for mark in marks if mark)}",
        bind,
        dtype,
        min_sm=89 if epilogue else 80,
        # The scale of a row is its largest element's, rounded as that is.
        tolerance=1.5e-2 if epilogue else _TOLERANCE[dtype],
    )


SPEC = Spec(
    small=(
        *(
            _norm(3, width, dtype=dtype, gemma=gemma, residual=residual)
            for width in (96, 1, 576, 1000)
            for residual in (True, False)
            for gemma in (False, True)
            for dtype in FLOATS
        ),
        *(_norm(3, 64, dtype=dtype, epilogue="static") for dtype in FLOATS),
        _norm(17, 64, ahead=BF16),
        *(_norm(3, 64, dtype=dtype, epilogue="static", spread=900) for dtype in FLOATS),
        *(
            _norm(4, width, dtype=dtype, gemma=gemma, epilogue="tokens")
            for width in (96, 1, 1000)
            for gemma in (False, True)
            for dtype in FLOATS
        ),
    ),
    served=(
        _norm(64, 4096),  # Mixtral 8x7B, before its router
        _norm(64, 4096, ahead=BF16),  # Llama 3.1 8B, Qwen3 8B, Mixtral 8x7B
        _norm(64, 4096, residual=False, ahead=BF16),
        _norm(64, 4096, epilogue="static", ahead=E4M3),
        _norm(64, 4096, epilogue="tokens", ahead=E4M3),
        _norm(64, 8192, epilogue="tokens", ahead=E4M3),
        _norm(64, 8192, ahead=BF16),  # Llama 3.1 70B
        _norm(64, 576, ahead=BF16),  # SmolLM2 135M
        _norm(64, 640, gemma=True, ahead=BF16),  # Gemma 3 270M
    ),
    large=(
        *(_norm(300, width, dtype=dtype) for width in (4096, 576) for dtype in (BF16, FP16, FP32)),
        _norm(7, 1000),
        _norm(1, 8192),
        _norm(300, 4096, epilogue="tokens"),
    ),
)
