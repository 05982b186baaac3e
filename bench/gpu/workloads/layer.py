"""The work of a layer besides products and attention: it moves bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from bench.gpu.device import Call
from bench.gpu.roofline import LLAMA_8B, QWEN3_8B, Cost, ModelShape
from bench.gpu.workloads.workload import Workload
from scalellm.kernels import Ops
from scalellm.kernels.spec.case import E4M3, Maker

_BF16 = torch.bfloat16
_TARGET = 0.85
_MANY = 8192  # rows of a batch in which bandwidth counts, and not the launch


def _work(
    op: str,
    what: str,
    read: float,
    written: float,
    bind: Callable[[Ops, Maker], Call],
    rows: int,
    own: Callable[[Maker], Call] | None = None,
    own_name: str = "",
    **options: Any,
) -> Workload:
    target = _TARGET if rows >= _MANY else None
    cost = Cost(read + written, written=written)
    return Workload(op, f"{rows} x {what}", cost, bind, own, own_name, target, resident_bytes=cost.num_bytes, **options)


def _norm(rows: int, width: int, *, e4m3: bool = False) -> Workload:
    def bind(ops: Ops, make: Maker) -> Call:
        x, residual, weight = (make.randn(*size, dtype=_BF16) for size in ((rows, width), (rows, width), (width,)))
        out = torch.empty(rows, width, dtype=E4M3 if e4m3 else _BF16, device=make.device)
        scale = make.poison(rows, 1) if e4m3 else None
        return lambda: ops.fused_add_rms_norm(x, residual, weight, 1e-5, token_scale=scale, out=out)

    def own(make: Maker) -> Call:
        x, residual, weight = (make.randn(*size, dtype=_BF16) for size in ((rows, width), (rows, width), (width,)))
        return lambda: F.rms_norm(residual.add_(x), [width], weight, 1e-5)

    read, written = 4.0 * rows * width, rows * width * (3.0 if e4m3 else 4.0)
    what = f"{width}{' to e4m3' if e4m3 else ''}"
    baseline = (None, "") if e4m3 else (own, "add_, F.rms_norm")
    return _work("fused_add_rms_norm", what, read, written, bind, rows, *baseline, min_sm=89 if e4m3 else 80)


def _gated(rows: int, width: int, *, e4m3: bool = False) -> Workload:
    def bind(ops: Ops, make: Maker) -> Call:
        x = make.randn(rows, 2 * width, dtype=_BF16)
        out = torch.empty(rows, width, dtype=E4M3 if e4m3 else _BF16, device=make.device)
        scale = make.poison(rows, 1) if e4m3 else None
        return lambda: ops.silu_and_mul(x, token_scale=scale, out=out)

    def own(make: Maker) -> Call:
        gate, up = make.randn(rows, 2 * width, dtype=_BF16).chunk(2, -1)
        return lambda: F.silu(gate) * up

    read, written = 4.0 * rows * width, rows * width * (1.0 if e4m3 else 2.0)
    baseline = (None, "") if e4m3 else (own, "F.silu, mul")
    what = f"{width}{' to e4m3' if e4m3 else ''}"
    return _work("silu_and_mul", what, read, written, bind, rows, *baseline, min_sm=89 if e4m3 else 80)


def _rope(rows: int, shape: ModelShape, cache_dtype: torch.dtype) -> Workload:
    dim, kv = shape.head_dim, shape.kv_heads

    def bind(ops: Ops, make: Maker) -> Call:
        qkv = make.randn(rows, shape.qkv_columns, dtype=_BF16)
        blocks = -(-rows // 64) * 2
        k_cache, v_cache = (make.poison(blocks, 64, kv, dim, dtype=cache_dtype) for _ in range(2))
        slots, positions = make.permutation(blocks * 64)[:rows], make.randint(0, 4096, rows)
        cos_sin, out_q = make.rand(4096, dim), torch.empty(rows, shape.q_heads, dim, dtype=_BF16, device=make.device)
        weight = make.randn(dim, dtype=_BF16) if shape.qk_norm else None
        scale = make.tensor([1.0], torch.float32) if cache_dtype == E4M3 else None
        return lambda: ops.qk_norm_rope_and_cache(
            qkv, positions, cos_sin, slots, k_cache, v_cache,
            q_norm=weight, k_norm=weight, k_scale=scale, v_scale=scale, out_q=out_q,
        )  # fmt: skip

    written = float(rows * (shape.q_heads * dim * 2 + 2 * kv * dim * cache_dtype.itemsize))
    read = float(rows * (shape.qkv_columns * 2 + 4 * dim + 16))
    what = f"{shape.q_heads}/{kv}x{dim}{' norm' if shape.qk_norm else ''} {'e4m3' if cache_dtype == E4M3 else 'bf16'}"
    e4m3 = cache_dtype == E4M3
    min_sm = 89 if e4m3 else 80
    return _work("qk_norm_rope_and_cache", what, read, written, bind, rows, kv_cache_dtype=cache_dtype, min_sm=min_sm)


def _quant(rows: int, width: int) -> Workload:
    def bind(ops: Ops, make: Maker) -> Call:
        x = make.randn(rows, width, dtype=_BF16)
        out = torch.empty(rows, width, dtype=E4M3, device=make.device), make.poison(rows, 1)
        return lambda: ops.scaled_fp8_quant(x, out=out)

    return _work("scaled_fp8_quant", f"{width} tokens", 2.0 * rows * width, 1.0 * rows * width, bind, rows, min_sm=89)


def _copy_blocks(count: int, shape: ModelShape) -> Workload:
    block = 64 * shape.kv_heads * shape.head_dim

    def bind(ops: Ops, make: Maker) -> Call:
        size = (2 * count, 64, shape.kv_heads, shape.head_dim)
        k_cache, v_cache = (make.randn(*size, dtype=_BF16) for _ in range(2))
        order = make.permutation(2 * count)
        pairs = torch.stack((order[:count], order[count:]), 1)
        return lambda: ops.copy_blocks_(k_cache, v_cache, pairs)

    # Bytes of both caches, read and written.
    num_bytes = 8.0 * count * block
    cost = Cost(num_bytes, written=num_bytes / 2)
    return Workload("copy_blocks_", f"{count} blocks", cost, bind, resident_bytes=num_bytes)


def workloads(*, tiny: bool) -> list[Workload]:
    """Decode batches and one in which bandwidth counts."""
    if tiny:
        llama = replace(LLAMA_8B, q_heads=4, kv_heads=2, head_dim=64)
        qwen = replace(llama, qk_norm=True)
        return [
            _norm(2, 64),
            _norm(2, 64, e4m3=True),
            _gated(2, 64),
            _gated(2, 64, e4m3=True),
            _rope(2, llama, _BF16),
            _rope(2, qwen, E4M3),
            _quant(2, 64),
            _copy_blocks(1, replace(llama, kv_heads=1, head_dim=8)),
        ]
    rows = (_MANY, 1, 8, 64, 256)
    return [
        *(_norm(n, 4096) for n in rows),
        *(_gated(n, 14336) for n in rows),
        *(_rope(n, LLAMA_8B, _BF16) for n in rows),
        *(_norm(n, 4096, e4m3=True) for n in (_MANY, 64)),
        *(_gated(n, 14336, e4m3=True) for n in (_MANY, 64)),
        *(_rope(n, LLAMA_8B, E4M3) for n in (_MANY, 64)),
        *(_rope(n, QWEN3_8B, _BF16) for n in (_MANY, 64)),
        *(_quant(n, 4096) for n in (_MANY, 64)),
        _copy_blocks(64, LLAMA_8B),
    ]
