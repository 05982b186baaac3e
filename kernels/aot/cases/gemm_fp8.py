"""Products of e4m3 that torch does not take: scales of blocks of 128, for projections of Llama 3.1 8B."""

import torch
from torch import Tensor

from scalellm.kernels.aot.recorder import Case
from scalellm.kernels.dispatch import Ops

_E4M3, _INNER, _BLOCK = torch.float8_e4m3fn, 4096, 128


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _gemm(rows: int, columns: int) -> Case:
    def call(ops: Ops) -> None:
        ops.fp8_gemm(
            _meta(rows, _INNER, dtype=_E4M3),
            _meta(columns, _INNER, dtype=_E4M3),
            _meta(rows, _INNER // _BLOCK),
            _meta(columns // _BLOCK, _INNER // _BLOCK),
            out=_meta(rows, columns, dtype=torch.bfloat16),
        )

    return Case(f"fp8_gemm {rows}x{columns} blocks", call, min_sm=89)


CASES = (*(_gemm(rows, 6144) for rows in (1, 64, 1024)), _gemm(16, 28672))
