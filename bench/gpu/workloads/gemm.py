"""Products with what is around them, with weights that are not bfloat16, and expert layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from bench.gpu.device import Call
from bench.gpu.roofline import LLAMA_8B, MIXTRAL, Cost, ModelShape, expert_layer, linear
from bench.gpu.workloads.workload import Workload
from scalellm.kernels import WNA16_INTERLEAVE, Ops, RowNorm, fused_moe_workspace_size, num_squares
from scalellm.kernels.spec.case import E4M3, Maker
from scalellm.kernels.spec.moe import route

_BF16 = torch.bfloat16
_GROUP = 128
_MOST_SHARES = 64  # that a tile table may choose


def _plain(rows: int, inner: int, columns: int, make: Maker) -> Call:
    x, weight = make.randn(rows, inner, dtype=_BF16), make.randn(columns, inner, dtype=_BF16)
    return lambda: F.linear(x, weight)


def _fused(rows: int, inner: int, columns: int, what: str) -> Workload:
    """`what` is around the product: "norm", "norm and gate" with two matrices of `columns` each, or "added"."""
    all_columns = (2 if what == "norm and gate" else 1) * columns

    def bind(ops: Ops, make: Maker) -> Call:
        x, weight = make.randn(rows, inner, dtype=_BF16), make.randn(all_columns, inner, dtype=_BF16)
        out = make.randn(rows, columns, dtype=_BF16)
        options: dict[str, Any]
        if what == "added":
            options = {"residual": out, "squares": make.poison(rows, num_squares(columns))}
        else:
            squares, norm_weight = make.rand(rows, num_squares(inner)), make.rand(inner, dtype=_BF16)
            options = {"norm": RowNorm(squares, norm_weight, 1e-5, False), "out": out}
            if what == "norm and gate":
                options["gate"] = "silu"
        return lambda: ops.fused_linear(x, weight, **options)

    cost = linear(rows, inner, all_columns, "bf16")
    return Workload(
        "fused_linear",
        f"{rows} x {inner} x {columns} {what}",
        cost,
        bind,
        lambda make: _plain(rows, inner, all_columns, make),
        "F.linear, bf16",
        resident_bytes=2.0 * inner * all_columns,
    )


def _packed(bits: int, rows: int, inner: int, columns: int) -> Workload:
    group = min(_GROUP, inner)
    weight_bytes = inner * columns * bits / 8 + 4 * inner // group * columns
    cost = Cost(weight_bytes + 2.0 * rows * (inner + columns), bf16_flops=2.0 * rows * inner * columns)

    def bind(ops: Ops, make: Maker) -> Call:
        words = make.randint(-(2**31), 2**31, inner * bits // 32, columns, dtype=torch.int32)
        scales, zeros = (make.rand(inner // group, columns, dtype=_BF16) for _ in range(2))
        x, out = make.randn(rows, inner, dtype=_BF16), make.poison(rows, columns, dtype=_BF16)
        workspace = make.poison(_MOST_SHARES * rows * columns)
        gemm = ops.w4a16_gemm if bits == 4 else ops.w8a16_gemm
        form = {"group_size": group, "interleave": WNA16_INTERLEAVE}
        return lambda: gemm(x, words, scales, zeros, **form, workspace=workspace, out=out)

    return Workload(
        f"w{bits}a16_gemm",
        f"{rows} x {inner} x {columns}",
        cost,
        bind,
        lambda make: _plain(rows, inner, columns, make),
        "F.linear, bf16",
        resident_bytes=2.0 * inner * columns,
    )


def _fp8(rows: int, inner: int, columns: int) -> Workload:
    def bind(ops: Ops, make: Maker) -> Call:
        a, b = make.randn(rows, inner).to(E4M3), make.randn(columns, inner).to(E4M3)
        a_scale, b_scale = make.rand(rows, 1) + 0.5, make.rand(columns, 1) + 0.5
        out = make.poison(rows, columns, dtype=_BF16)
        return lambda: ops.fp8_gemm(a, b, a_scale, b_scale, out=out)

    cost = linear(rows, inner, columns, "fp8")
    cost = replace(cost, num_bytes=cost.num_bytes - rows * inner)  # here the activations are e4m3, too
    return Workload(
        "fp8_gemm",
        f"{rows} x {inner} x {columns}",
        cost,
        bind,
        lambda make: _plain(rows, inner, columns, make),
        "F.linear, bf16",
        min_sm=89,
        resident_bytes=2.0 * inner * columns,
    )


def _experts(shape: ModelShape, tokens: int, *, e4m3: bool) -> Workload:
    hidden, inner, experts = shape.hidden, shape.intermediate, shape.experts
    cost = expert_layer(shape, tokens, "fp8" if e4m3 else "bf16")

    def bind(ops: Ops, make: Maker) -> Call:
        dtype = E4M3 if e4m3 else _BF16
        # One expert at a time: in float32 all of them would be twice the memory of what is measured.
        w13, w2 = (
            torch.stack([make.randn(*size, dtype=_BF16).to(dtype) for _ in range(experts)])
            for size in ((2 * inner, hidden), (hidden, inner))
        )
        scales = [make.rand(experts, n, 1) if e4m3 else None for n in (2 * inner, hidden)]
        x, (weights, ids) = make.randn(tokens, hidden, dtype=_BF16), route(make, tokens, experts, shape.choices)
        size = fused_moe_workspace_size(tokens, shape.choices, experts, 2 * inner, hidden)
        workspace, out = make.poison(size, dtype=torch.int32), make.poison(tokens, hidden, dtype=_BF16)
        return lambda: ops.fused_moe(
            x, w13, w2, weights, ids, w13_scale=scales[0], w2_scale=scales[1], workspace=workspace, out=out
        )

    resident = 3.0 * experts * hidden * inner * (1 if e4m3 else 2)
    what = f"{tokens} x {shape.choices} of {experts} {'e4m3' if e4m3 else 'bf16'}"
    return Workload("fused_moe", what, cost, bind, min_sm=89 if e4m3 else 80, resident_bytes=resident)


def _packed_experts(shape: ModelShape, tokens: int, bits: int) -> Workload:
    hidden, inner, experts = shape.hidden, shape.intermediate, shape.experts
    group = min(_GROUP, inner)

    def bind(ops: Ops, make: Maker) -> Call:
        sizes = (hidden, 2 * inner), (inner, hidden)
        words = [
            make.randint(-(2**31), 2**31, experts, rows * bits // 32, columns, dtype=torch.int32)
            for rows, columns in sizes
        ]
        scales = [make.rand(experts, rows // group, columns, dtype=_BF16) for rows, columns in sizes]
        x, (weights, ids) = make.randn(tokens, hidden, dtype=_BF16), route(make, tokens, experts, shape.choices)
        size = fused_moe_workspace_size(tokens, shape.choices, experts, 2 * inner, hidden)
        workspace, out = make.poison(size, dtype=torch.int32), make.poison(tokens, hidden, dtype=_BF16)
        return lambda: ops.fused_moe_wna16(
            x, words[0], words[1], weights, ids, w13_scales=scales[0], w2_scales=scales[1],
            bits=bits, group_size=group, interleave=WNA16_INTERLEAVE, workspace=workspace, out=out,
        )  # fmt: skip

    cost = expert_layer(shape, tokens, "int4")
    what = f"{tokens} x {shape.choices} of {experts} {bits} bits"
    return Workload("fused_moe_wna16", what, cost, bind, resident_bytes=3.0 * experts * hidden * inner * bits / 8)


def _routing(shape: ModelShape, tokens: int) -> list[Workload]:
    experts, k = shape.experts, shape.choices

    def topk(ops: Ops, make: Maker) -> Call:
        logits = make.randn(tokens, experts, dtype=_BF16)
        out = make.poison(tokens, k), make.poison(tokens, k, dtype=torch.int32)
        return lambda: ops.topk_softmax(logits, k, True, out=out)

    def own(make: Maker) -> Call:
        logits = make.randn(tokens, experts, dtype=_BF16)
        return lambda: logits.float().softmax(-1).topk(k)

    def align(ops: Ops, make: Maker) -> Call:
        ids = route(make, tokens, experts, k)[1]
        return lambda: ops.moe_align_block_size(ids, 16, experts)

    what = f"{tokens} x {k} of {experts}"
    return [
        Workload("topk_softmax", what, Cost(2.0 * tokens * experts + 8.0 * tokens * k), topk, own, "softmax, topk"),
        Workload("moe_align_block_size", what, Cost(8.0 * tokens * k), align),
    ]


def workloads(*, tiny: bool) -> list[Workload]:
    """Projections of Llama-3.1-8B, the expert layer of Mixtral."""
    if tiny:
        small = replace(MIXTRAL, hidden=64, intermediate=64, experts=4)
        return [
            *(_fused(2, 64, 32, what) for what in ("norm", "norm and gate", "added")),
            _packed(4, 2, 128, 64),
            _packed(8, 2, 128, 64),
            _fp8(2, 32, 16),
            _experts(small, 2, e4m3=False),
            _experts(small, 2, e4m3=True),
            _packed_experts(replace(small, hidden=128, intermediate=128), 2, 4),
            *_routing(small, 2),
        ]
    hidden, up = LLAMA_8B.hidden, 2 * LLAMA_8B.intermediate
    return [
        *(_fused(rows, hidden, LLAMA_8B.qkv_columns, "norm") for rows in (1, 8, 16)),
        *(_fused(rows, hidden, LLAMA_8B.intermediate, "norm and gate") for rows in (1, 8, 16)),
        *(_fused(rows, LLAMA_8B.intermediate, hidden, "added") for rows in (1, 8, 16)),
        *(_packed(4, rows, hidden, up) for rows in (1, 8, 64, 65, 128, 256)),
        *(_packed(4, rows, LLAMA_8B.intermediate, hidden) for rows in (1, 64)),
        *(_packed(4, rows, hidden, LLAMA_8B.qkv_columns) for rows in (1, 64)),
        *(_packed(8, rows, hidden, up) for rows in (1, 64)),
        *(_fp8(rows, hidden, up) for rows in (1, 16, 64, 256, 1024)),
        *(_fp8(rows, LLAMA_8B.intermediate, hidden) for rows in (1, 16, 64)),
        *(_experts(MIXTRAL, tokens, e4m3=True) for tokens in (1, 8, 64, 128, 240, 256)),
        *(_experts(MIXTRAL, tokens, e4m3=False) for tokens in (1, 64)),
        *(_packed_experts(MIXTRAL, tokens, 4) for tokens in (1, 64)),
        *_routing(MIXTRAL, 64),
    ]
