"""Block copies."""

import torch

from kernels.aot.recorder import Case
from kernels.dispatch import Ops


def _copy_blocks(ops: Ops) -> None:
    cache = torch.empty(1000, 64, 8, 128, dtype=torch.bfloat16, device="meta")
    ops.copy_blocks_(cache, cache, torch.empty(4, 2, dtype=torch.int64, device="meta"))


CASES = (Case("copy_blocks_", _copy_blocks),)
