"""The program that compute-sanitizer watches: the kernels that compute addresses from tables, once each.

    compute-sanitizer --tool memcheck python3 -m bench.gpu.sanitized

Small shapes, as every access is checked; each tensor is its own allocation (`PYTORCH_NO_CUDA_MEMORY_CACHING=1`), so
that one past the end of a tensor is one past the end of memory.
"""

from __future__ import annotations

import argparse
import sys

import torch

from bench.gpu.worker import make_device
from scalellm.kernels import Launch, select_ops
from scalellm.kernels.spec import BRIEF

OPS = ("unified_attention", "paged_attention_decode", "qk_norm_rope_and_cache", "copy_blocks_", "fused_moe", "sample")


def main() -> int:
    """Run the small cases of these ops; exit code 1 when a result is wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.sanitized")
    parser.add_argument("--dry-run", action="store_true", help="on the interpreter")
    args = parser.parse_args()
    device = make_device(args.dry_run)
    launch = Launch(device.capability)
    wrong = 0
    with torch.inference_mode():
        for case in BRIEF:
            if case.op not in OPS or device.capability.sm < case.min_sm:
                continue
            ops = select_ops(device.capability, dtype=case.dtype, kv_cache_dtype=case.kv_cache_dtype, launch=launch)
            outcome = case.check(ops, device.target)
            device.synchronize()
            wrong += not outcome.passed
            print(f"{'right' if outcome.passed else 'WRONG'} {case.name} {outcome.detail}".rstrip(), flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
