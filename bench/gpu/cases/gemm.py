"""Products with packed integers and with e4m3 matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.gpu.cases.case import E4M3, Bound, Case, Maker
from scalellm.kernels import WNA16_INTERLEAVE, Ops, gemm_wna16_workspace_size

_BF16 = torch.bfloat16


def pack(q: Tensor, bits: int, interleave: int = 1) -> Tensor:
    """Pack integers [..., K, N] into words [..., K * bits / 32, N], i32, as `w4a16_gemm` says of `interleave`."""
    shifts = torch.arange(0, 32, bits, device=q.device).view(-1, 1, 1)
    words = (q.unflatten(-2, (-1, 32 // bits, interleave)) << shifts).sum(-3).flatten(-3, -2)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def _packed(
    bits: int,
    rows: int,
    inner: int,
    columns: int,
    group_size: int,
    *,
    zeros: bool = False,
    dtype: torch.dtype = _BF16,
    interleave: int = WNA16_INTERLEAVE,
) -> Case:
    op = f"w{bits}a16_gemm"

    def bind(ops: Ops, make: Maker) -> Bound:
        groups = inner // group_size
        q = make.randint(0, 1 << bits, inner, columns)
        words = pack(q, bits, interleave)
        scales = ((make.rand(groups, columns) + 0.5) / (1 << bits)).to(dtype)
        zero_points = (make.rand(groups, columns) * (1 << bits)).to(dtype) if zeros else None
        x, out = make.randn(rows, inner, dtype=dtype), make.poison(rows, columns, dtype=dtype)
        assert ops.launch is not None
        size = gemm_wna16_workspace_size(ops.launch.capability, bits, rows, inner, columns, group_size)
        workspace = make.poison(size)

        def expected() -> dict[str, Tensor]:
            zero = float(1 << (bits - 1)) if zero_points is None else zero_points.double().unsqueeze(1)
            weight = (q.view(groups, group_size, columns) - zero) * scales.double().unsqueeze(1)
            return {"out": x.double() @ weight.view(inner, columns)}

        def run() -> object:
            gemm = ops.w4a16_gemm if bits == 4 else ops.w8a16_gemm
            form = {"group_size": group_size, "interleave": interleave}
            return gemm(x, words, scales, zero_points, **form, workspace=workspace, out=out)

        return Bound(run, {"out": out}, expected)

    name = str(dtype).removeprefix("torch.")
    what = f"{rows}x{inner}x{columns} {name} groups of {group_size}{' zeros' if zeros else ''}"
    if interleave == 1:
        what += " plain"
    return Case(op, what, bind, dtype)


def _fp8(rows: int, inner: int, columns: int, scales: str, *, bias: bool = False) -> Case:
    """`scales`: of "tensor", "rows" or "blocks" of 128 x 128 with groups of 128 columns."""

    def bind(ops: Ops, make: Maker) -> Bound:
        a, b = make.randn(rows, inner).to(E4M3), make.randn(columns, inner).to(E4M3)
        shapes = {
            "tensor": ((1, 1), (1, 1)),
            "rows": ((rows, 1), (columns, 1)),
            "blocks": ((rows, inner // 128), (columns // 128, inner // 128)),
        }
        a_scale, b_scale = (make.rand(*shape) + 0.5 for shape in shapes[scales])
        offset = make.randn(columns, dtype=_BF16) if bias else None
        out = make.poison(rows, columns, dtype=_BF16)

        def expected() -> dict[str, Tensor]:
            product = _spread(a, a_scale) @ _spread(b, b_scale).T
            return {"out": product if offset is None else product + offset.double()}

        return Bound(lambda: ops.fp8_gemm(a, b, a_scale, b_scale, bias=offset, out=out), {"out": out}, expected)

    return Case("fp8_gemm", f"{rows}x{inner}x{columns} scales of {scales}{' bias' if bias else ''}", bind, min_sm=89)


def _spread(x: Tensor, scale: Tensor) -> Tensor:
    rows, columns = (n // m for n, m in zip(x.shape, scale.shape, strict=True))
    return x.double() * scale.double().repeat_interleave(rows, 0).repeat_interleave(columns, 1)


def cases(*, tiny: bool) -> list[Case]:
    """One row to more than the kernels take, group sizes of AWQ, GPTQ and GGUF, columns that are no multiple of 64."""
    if tiny:
        return [
            _packed(4, 2, 256, 70, 32, zeros=True),
            _packed(8, 2, 48, 64, 16, interleave=1),
            _packed(8, 130, 64, 64, 32),
            _fp8(2, 32, 16, "rows"),
            _fp8(2, 128, 128, "blocks"),
        ]
    return [
        *(_packed(4, rows, 4096, 6144, 128, zeros=True) for rows in (1, 3, 16, 64, 65, 128, 300)),
        *(_packed(8, rows, 4096, 6144, 128) for rows in (1, 17, 64, 300)),
        *(_packed(bits, 5, 4096, 4096, 32, zeros=True) for bits in (4, 8)),
        _packed(4, 33, 14336, 4096, 128),
        _packed(4, 2, 1024, 130, 32),
        *(_packed(4, rows, 1024, 130, 32, interleave=1) for rows in (2, 300)),
        _packed(4, 2, 1024, 1024, 1024),
        _packed(4, 9, 4096, 4096, 128, dtype=torch.float16),
        *(_fp8(rows, 4096, 6144, scales) for rows in (1, 64, 300) for scales in ("tensor", "rows")),
        _fp8(17, 4096, 4096, "rows", bias=True),
        _fp8(17, 512, 256, "blocks"),
    ]
