"""One specification per op: formula and source, inputs of every kind, their results in float64, and the tolerance.

A file has the ops of the file of its name in `kernels/reference` or `kernels/triton`, with one `SPEC`. It is read by
- `tests/kernels/test_specs.py`: torch and C++ forms on the CPU, small cases;
- `tests/kernels/interp/test_specs_interp.py`: Triton forms on the interpreter, small cases;
- `kernels.aot`: what Triton compiles for serving, on tensors without memory, served cases;
- `bench.gpu`: parity, graphs and sanitizers on a device, served and large cases.

Properties other than the comparison with float64 (refusals, views, independence of other rows) have tests of their own.
"""

from collections.abc import Iterable

from scalellm.kernels.spec import (
    activation,
    attention,
    attention_decode,
    cache,
    draws,
    gemm_fp8,
    gemm_wna16,
    linear,
    logits,
    lora,
    moe,
    moe_routing,
    norm,
    quant,
    rope,
    sampling,
)
from scalellm.kernels.spec.case import BF16, Case
from scalellm.kernels.spec.draws import DrawCase

SPECS = tuple(  # those that take long to compile first
    module.SPEC
    for module in (
        attention,
        attention_decode,
        moe,
        gemm_wna16,
        gemm_fp8,
        linear,
        sampling,
        logits,
        norm,
        activation,
        rope,
        quant,
        moe_routing,
        lora,
        cache,
    )
)
SMALL = tuple(case for spec in SPECS for case in spec.small)
SERVED = tuple(case for spec in SPECS for case in spec.served)
ON_DEVICE = tuple(case for spec in SPECS for case in (*spec.served, *spec.large))


def one_of_each(cases: Iterable[Case]) -> tuple[Case, ...]:
    """Return the first case of each op, dtype and dtype of the cache, of those that take the least memory."""
    chosen: dict[tuple[object, ...], Case] = {}
    for case in sorted(cases, key=lambda case: case.gibibytes):
        chosen.setdefault((case.op, case.dtype, case.kv_cache_dtype, case.min_sm), case)
    return tuple(chosen.values())


BRIEF = one_of_each(case for case in SMALL if case.dtype == BF16 or case.op in ("apply_logits_processors_", "sample"))
"""A small case of each op and kind of result: for dry runs, and for tools under which a kernel takes seconds."""

DRAWS: tuple[DrawCase, ...] = draws.LARGE
