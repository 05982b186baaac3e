"""`w4a16_gemm` and `w8a16_gemm`: y = x ((q - z) * s), of x [M, K] and packed integers q [K, N] of 4 or 8 bits.

A group of K shares its scale s and zero point z [K / group, N]; without zeros z is 2^(bits - 1) (AWQ, Lin et al. 2023;
GPTQ, Frantar et al. 2022). The C++ form rounds groups of x to 8 bits as well, so it is held to what that gives.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scalellm.kernels.dispatch import Ops
from scalellm.kernels.spec.case import BF16, FP16, FP32, Bound, Case, Maker, Spec, capability_of, name_of
from scalellm.kernels.workspaces import WNA16_INTERLEAVE, gemm_wna16_workspace_size

_TOLERANCE = {FP32: 2e-6, BF16: 1e-2, FP16: 2e-3}  # weights are rounded to the dtype, and results
PLAIN = 1


def pack(q: Tensor, bits: int, interleave: int = PLAIN) -> Tensor:
    """Pack integers [..., K, N] into words [..., K * bits / 32, N], i32, as `w4a16_gemm` says of `interleave`."""
    shifts = torch.arange(0, 32, bits, device=q.device).view(-1, 1, 1)
    *experts, inner, columns = q.shape
    fields = q.view(*experts, bits * inner // (32 * interleave), 32 // bits, interleave, columns)
    words = (fields << shifts).sum(-3).flatten(-3, -2)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def unpacked(q: Tensor, scales: Tensor, zeros: Tensor | None, bits: int) -> Tensor:
    """Return the weight [..., K, N] in float64 that integers stand for, with scales and zeros [..., groups, N]."""
    zero = float(1 << (bits - 1)) if zeros is None else zeros.double().unsqueeze(-2)
    groups = q.view(*scales.shape[:-1], -1, scales.shape[-1])
    return ((groups - zero) * scales.double().unsqueeze(-2)).flatten(-3, -2)


def rounded_to_bytes(x: Tensor, group_size: int) -> Tensor:
    """Return x in float64 after its groups were rounded to -127..127 times a scale."""
    groups = x.double().view(x.shape[0], x.shape[1] // group_size, group_size)
    scales = groups.abs().amax(-1, keepdim=True) / 127
    return torch.where(scales == 0, 0, (groups / scales).round() * scales).flatten(1)


def _gemm(
    bits: int,
    rows: int,
    inner: int,
    columns: int,
    group_size: int,
    *,
    zeros: bool = False,
    dtype: torch.dtype = BF16,
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
        size = (
            gemm_wna16_workspace_size(capability_of(ops), bits, rows, inner, columns, group_size) if ops.launch else 1
        )
        workspace = make.poison(size)

        def expected() -> dict[str, Tensor]:
            weight = unpacked(q, scales, zero_points, bits)
            cpp = ops.backends[op] == "cpp" and dtype != FP16 and interleave == PLAIN
            return {"out": (rounded_to_bytes(x, group_size) if cpp else x.double()) @ weight}

        def run() -> object:
            gemm = ops.w4a16_gemm if bits == 4 else ops.w8a16_gemm
            form = {"group_size": group_size, "interleave": interleave}
            return gemm(x, words, scales, zero_points, **form, workspace=workspace, out=out)

        return Bound(run, {"out": out}, expected)

    what = f"{rows}x{inner}x{columns} {name_of(dtype)} groups of {group_size}{' zeros' if zeros else ''}"
    if interleave == PLAIN:
        what += " plain"
    return Case(op, what, bind, dtype, tolerance=_TOLERANCE[dtype], allocates=rows > 128)


def _small(bits: int) -> list[Case]:
    # A group is narrower than the interleave, or the whole inner dimension; tiles do not divide the columns.
    interleaved = ((2, 256, 64, 128), (3, 384, 70, 32), (1, 128, 12, 8), (100, 128, 33, 64))
    plain = ((1, 256, 64, 128), (3, 128, 70, 32), (1, 64, 12, 8), (17, 192, 33, 192), (2, 1024, 130, 1024))
    return [
        *(_gemm(bits, *sizes, zeros=sizes[0] != 2) for sizes in interleaved),
        _gemm(bits, 130, 128, 33, 64, zeros=True),  # unpacked
        *(
            _gemm(bits, *sizes, zeros=zeros, dtype=FP16 if sizes[0] == 3 else BF16, interleave=PLAIN)
            for sizes in plain
            for zeros in (False, True)
        ),
        *(_gemm(bits, rows, 128, 40, 32, zeros=True, dtype=FP32, interleave=PLAIN) for rows in (2, 65)),
        _gemm(bits, 130, 64, 140, 32, zeros=True, interleave=PLAIN),
    ]


SPEC = Spec(
    small=(*_small(4), *_small(8)),
    served=(  # Llama 3.1 8B, in the group sizes of AWQ and GPTQ and of GGUF
        *(_gemm(4, rows, 4096, 6144, 128, zeros=True) for rows in (1, 32, 64, 128)),
        *(_gemm(4, rows, 4096, 28672, 128) for rows in (1, 32, 64)),
        *(_gemm(4, rows, 4096, 6144, 32, zeros=True) for rows in (1, 64, 128)),
        _gemm(4, 1, 4096, 6144, 128, zeros=True, interleave=PLAIN),
        *(_gemm(8, rows, 4096, 6144, 128) for rows in (1, 64, 128)),
        *(_gemm(8, rows, 4096, 6144, 32) for rows in (1, 64)),
        *(_gemm(bits, 1024, 4096, 6144, 128, zeros=zeros) for bits in (4, 8) for zeros in (False, True)),
    ),
    large=(
        *(_gemm(4, rows, 4096, 6144, 128, zeros=True) for rows in (3, 16, 65, 300)),
        *(_gemm(8, rows, 4096, 6144, 128) for rows in (17, 300)),
        *(_gemm(bits, 5, 4096, 4096, 32, zeros=True) for bits in (4, 8)),
        _gemm(4, 33, 14336, 4096, 128),
        _gemm(4, 2, 1024, 130, 32),
        *(_gemm(4, rows, 1024, 130, 32, interleave=PLAIN) for rows in (2, 300)),
        _gemm(4, 2, 1024, 1024, 1024),
        _gemm(4, 9, 4096, 4096, 128, dtype=FP16),
    ),
)
