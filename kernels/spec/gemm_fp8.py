"""`fp8_gemm`: y = (a * s_a) (b * s_b)^T + bias, of e4m3 a [M, K] and b [N, K] with float32 scales.

A scale is a matrix's, a row's, or a block's: groups of columns of a, squares of b (DeepSeek-V3). Sums are float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scalellm.kernels.dispatch import Ops
from scalellm.kernels.spec.case import BF16, E4M3, FP16, FP32, Bound, Case, Maker, Spec, name_of

_TOLERANCE = {FP32: 2e-6, BF16: 3e-3, FP16: 4e-4}  # one rounding
_ONE = (1, 1)
_Shape = tuple[int, int]


def spread(x: Tensor, scale: Tensor) -> Tensor:
    """Return x times its scales, which each stand for a block of it, in float64."""
    rows, columns = (n // m for n, m in zip(x.shape, scale.shape, strict=True))
    return x.double() * scale.double().repeat_interleave(rows, 0).repeat_interleave(columns, 1)


def _gemm(
    rows: int,
    inner: int,
    columns: int,
    a_scales: _Shape = _ONE,
    b_scales: _Shape = _ONE,
    *,
    bias: bool = False,
    dtype: torch.dtype = BF16,
    tolerance: float | None = None,
) -> Case:
    """`a_scales` and `b_scales`: numbers of scales, down and across the matrix."""

    def bind(ops: Ops, make: Maker) -> Bound:
        a, b = make.randn(rows, inner).to(E4M3), make.randn(columns, inner).to(E4M3)
        a_scale, b_scale = make.rand(*a_scales) + 0.5, make.rand(*b_scales) + 0.5
        offset = make.randn(columns, dtype=BF16) if bias else None
        out = make.poison(rows, columns, dtype=dtype)

        def expected() -> dict[str, Tensor]:
            product = spread(a, a_scale) @ spread(b, b_scale).T
            return {"out": product if offset is None else product + offset.double()}

        return Bound(lambda: ops.fp8_gemm(a, b, a_scale, b_scale, bias=offset, out=out), {"out": out}, expected)

    scales = "x".join(map(str, a_scales)), "x".join(map(str, b_scales))
    what = f"{rows}x{inner}x{columns} {name_of(dtype)} scales {scales[0]} and {scales[1]}{' bias' if bias else ''}"
    return Case("fp8_gemm", what, bind, min_sm=89, tolerance=tolerance or _TOLERANCE[dtype])


def _of_rows(rows: int, inner: int, columns: int, *, bias: bool = False) -> Case:
    # Of sums on the matrix units, which keep fewer bits than float32.
    return _gemm(rows, inner, columns, (rows, 1), (columns, 1), bias=bias, tolerance=1.5e-2)


def _of_blocks(rows: int, inner: int, columns: int) -> Case:
    return _gemm(rows, inner, columns, (rows, inner // 128), (columns // 128, inner // 128), tolerance=1.5e-2)


def _small() -> list[Case]:
    # Scales of tensors, of rows, and of groups of 32 or 64 columns for either; dimensions that tiles do not divide.
    found = []
    for rows, dtype in ((17, BF16), (1, BF16), (17, FP16), (65, FP32)):
        for a_scales, b_scales in (((0, 3), (35, 6)), (_ONE, _ONE), ((0, 1), (70, 1)), ((0, 6), _ONE), (_ONE, (7, 3))):
            found.append(_gemm(rows, 192, 70, (a_scales[0] or rows, a_scales[1]), b_scales, dtype=dtype))
    found.append(_gemm(3, 24, 20, bias=True, dtype=FP32))  # an inner dimension of less than a tile
    found.append(_gemm(5, 64, 32, (5, 1), (32, 1)))
    # Of more columns than a small kernel has tiles for, see the tile tables.
    found += [_gemm(17, 96, 16448, (17, 1), (16448, 1)), _gemm(33, 192, 16448, (33, 3), (257, 3), bias=True)]
    return found


SPEC = Spec(
    small=tuple(_small()),
    served=(  # Llama 3.1 8B
        *(_of_blocks(rows, 4096, 6144) for rows in (1, 64, 1024)),
        _of_blocks(16, 4096, 28672),
        _of_rows(1, 4096, 6144),
        _of_rows(16, 4096, 28672),
        _of_blocks(64, 4096, 28672),
        _of_rows(64, 4096, 28672),
        _of_rows(8, 14336, 4096),
        _of_rows(8, 4096, 4608, bias=True),  # Qwen2.5 7B
    ),
    large=(
        *(_gemm(rows, 4096, 6144, tolerance=1.5e-2) for rows in (1, 64, 300)),
        *(_of_rows(rows, 4096, 6144) for rows in (64, 300)),
        _of_rows(17, 4096, 4096, bias=True),
        _of_blocks(17, 512, 256),
    ),
)
