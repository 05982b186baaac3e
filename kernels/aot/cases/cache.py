"""Block copies."""

import torch

from scalellm.kernels.aot.recorder import Case
from scalellm.kernels.dispatch import Ops


def _copy_blocks(name: str, count: int) -> Case:
    def call(ops: Ops) -> None:
        cache = torch.empty(1000, 64, 8, 128, dtype=torch.bfloat16, device="meta")
        ops.copy_blocks_(cache, cache, torch.empty(count, 2, dtype=torch.int64, device="meta"))

    return Case(f"copy_blocks_ {name}", call)


CASES = (_copy_blocks("few", 4), _copy_blocks("many", 100))
