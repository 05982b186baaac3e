"""torch's own products in the shapes of Llama-3.1-8B's projections: they are most of a decode step."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.gpu.device import Call
from bench.gpu.part import Bench, Findings
from bench.gpu.roofline import LLAMA_8B, Ceilings, linear
from bench.gpu.timing import num_sets, time_op
from scalellm.kernels.reference.scaled_mm import scaled_mm
from scalellm.kernels.spec.case import E4M3, Maker

_ROWS = (1, 8, 16, 64, 256)


class Projections:
    """Times `torch.mm` in bfloat16, and the e4m3 product with scales of rows and columns, with either kind of sums."""

    def run(self, bench: Bench, found: Findings) -> None:
        """Add a row for each product and dtype."""
        device, ceilings = bench.device, Ceilings.of(bench.shared)
        shape = LLAMA_8B
        products = {
            "qkv": (shape.hidden, shape.qkv_columns),
            "o": (shape.q_heads * shape.head_dim, shape.hidden),
            "gate and up": (shape.hidden, 2 * shape.intermediate),
            "down": (shape.intermediate, shape.hidden),
        }
        kinds = ("bf16", "fp8", "fp8 fast sums") if device.capability.has_e4m3 else ("bf16",)
        if device.dry_run:
            products = {"tiny": (32, 16)}
        for rows in _ROWS[:1] if device.dry_run else _ROWS:
            for name, (inner, columns) in products.items():
                for kind in kinds:
                    if bench.seconds_left() < 0:
                        found.note(f"{name} {kind} at {rows} rows: left out: the time is spent")
                        continue
                    with found.attempt(f"{name} {kind} at {rows} rows", device):
                        cost = linear(rows, inner, columns, "bf16" if kind == "bf16" else "fp8")
                        num_bytes = int(cost.num_bytes)
                        make = Maker.on(device.target)
                        calls = [_bind(kind, make, rows, inner, columns) for _ in range(num_sets(device, num_bytes))]
                        us = time_op(device, calls, num_bytes).us
                        found.row(product=name, dtype=kind, rows=rows, us=us, ceiling=cost.floor_us(ceilings) / us)
                        found.check(f"{name} {kind} at {rows} rows is finite", bool(_result(calls[0]).isfinite().all()))


def _bind(kind: str, make: Maker, rows: int, inner: int, columns: int) -> Call:
    out = make.poison(rows, columns, dtype=torch.bfloat16)
    if kind == "bf16":
        x, weight = make.randn(rows, inner, dtype=torch.bfloat16), make.randn(columns, inner, dtype=torch.bfloat16)
        return lambda: torch.mm(x, weight.t(), out=out)
    x, weight = make.randn(rows, inner).to(E4M3), make.randn(columns, inner).to(E4M3)
    x_scale, weight_scale = make.rand(rows, 1) + 0.5, make.rand(columns, 1) + 0.5
    fast = kind == "fp8 fast sums"
    return lambda: scaled_mm(x, weight, x_scale, weight_scale, None, out, fast_sums=fast)


def _result(call: Call) -> Tensor:
    result = call()
    assert isinstance(result, Tensor)
    return result.float()
