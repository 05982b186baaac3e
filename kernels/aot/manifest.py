"""Every variant that serving compiles, for the model shapes of the presets.

A case is named after its op and what is special about it; a new file of cases is added to `CASES`.
"""

from scalellm.kernels.aot.cases import (
    activation,
    attention,
    cache,
    gemm_fp8,
    gemm_wna16,
    lora,
    moe,
    norm,
    quant,
    rope,
    sampling,
)
from scalellm.kernels.aot.recorder import Case

CASES: tuple[Case, ...] = (
    *activation.CASES,
    *attention.CASES,
    *cache.CASES,
    *gemm_fp8.CASES,
    *gemm_wna16.CASES,
    *lora.CASES,
    *moe.CASES,
    *norm.CASES,
    *quant.CASES,
    *rope.CASES,
    *sampling.CASES,
)
