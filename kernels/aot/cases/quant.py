"""Quantisation to e4m3 with one scale for each token, and for each 128 columns of one."""

import torch

from scalellm.kernels.aot.recorder import Case
from scalellm.kernels.dispatch import Ops


def _quant(name: str, width: int, *, group_size: int | None = None) -> Case:
    def call(ops: Ops) -> None:
        groups = width // (group_size or width)
        out = (
            torch.empty(64, width, dtype=torch.float8_e4m3fn, device="meta"),
            torch.empty(64, groups, device="meta"),
        )
        x = torch.empty(64, width, dtype=torch.bfloat16, device="meta")
        ops.scaled_fp8_quant(x, group_size=group_size, out=out)

    return Case(f"scaled_fp8_quant {name}", call, min_sm=89)


CASES = (
    _quant("4096", 4096),
    _quant("14336", 14336),
    _quant("4096 groups", 4096, group_size=128),
)
