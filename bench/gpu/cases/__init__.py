"""Calls of every op with inputs made on a device, and what float64 says they have to give.

`tiny` cases take the same paths in sizes that the interpreter gets through.
"""

from bench.gpu.cases import attention, cache, draws, gemm, layer, lora, moe, sampling
from bench.gpu.cases.case import Case
from bench.gpu.cases.draws import DrawCase


def all_cases(*, tiny: bool) -> list[Case]:
    """Return every case, those that take long to compile first."""
    return [
        *attention.cases(tiny=tiny),
        *moe.cases(tiny=tiny),
        *gemm.cases(tiny=tiny),
        *sampling.cases(tiny=tiny),
        *layer.cases(tiny=tiny),
        *lora.cases(tiny=tiny),
        *cache.cases(tiny=tiny),
    ]


def all_checks(*, tiny: bool) -> list[Case | DrawCase]:
    """Return the cases and what is shown by many calls together."""
    return [*all_cases(tiny=tiny), *draws.cases(tiny=tiny)]
