"""The process that runs parts: `python -m bench.gpu.worker`, a job on standard input, a JSON line for each result.

A process of its own, because an illegal access by one kernel ends the CUDA context for good, and takes along every
part that comes after it in the same process.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import time
import traceback
import warnings
from dataclasses import dataclass, field
from typing import Any, TextIO

from bench.gpu.device import CudaDevice, Device, DryRunDevice
from bench.gpu.part import DEVICE_LOST, Bench, Findings, Part, PartResult, PartSpec, UnavailableError


@dataclass(frozen=True, slots=True)
class Job:
    """Which parts to run and with what."""

    parts: list[PartSpec]
    dry_run: bool
    seconds: float
    """Left of the budget."""
    shared: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


def make_device(dry_run: bool) -> Device:
    """Return the device of this process.

    Raises:
        UnavailableError: torch sees no CUDA device, or one that is too old.
    """
    if dry_run:
        from bench.gpu import interpreter_fixes

        interpreter_fixes.install()
        # Of the interpreter of triton 3.6, at every loop whose bounds are tensors, and of numpy at inf and NaN.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=RuntimeWarning)
        return DryRunDevice()
    import torch

    if not torch.cuda.is_available():
        raise UnavailableError("torch sees no CUDA device; `--dry-run` needs none")
    device = CudaDevice()
    if device.capability.sm < 80:
        raise UnavailableError(f"{device.capability.name}: compute capability 8.0 is the least that kernels run on")
    return device


def run_part(spec: PartSpec, bench: Bench) -> PartResult:
    """Run one part; whatever it raises is its result."""
    found = Findings()
    start = time.monotonic()
    try:
        part: Part = getattr(importlib.import_module(spec.module), spec.attribute)()
        part.run(bench, found)
        bench.device.synchronize()
    except UnavailableError as error:
        return PartResult(spec.name, "skipped", notes=[str(error)])
    except Exception as error:
        traceback.print_exc()
        return PartResult.of(spec.name, found, time.monotonic() - start, f"{type(error).__name__}: {error}"[:2000])
    return PartResult.of(spec.name, found, time.monotonic() - start)


def is_lost(device: Device) -> bool:
    """Whether an error of the device has ended this process's use of it."""
    try:
        device.synchronize()
        device.release()
    except RuntimeError:
        return True
    return False


def run_job(job: Job, results: TextIO) -> int:
    """Run parts until all are done or the device is lost; returns the exit code."""
    import torch

    deadline = time.monotonic() + job.seconds
    shared = dict(job.shared)
    try:
        device = make_device(job.dry_run)
    except UnavailableError as error:
        for spec in job.parts:
            _write(results, PartResult(spec.name, "failed", error=str(error)))
        return 0
    gc.freeze()  # what was imported is not looked through again at every release of memory
    for spec in job.parts:
        if spec.seconds > deadline - time.monotonic() and not job.dry_run:
            note = (
                f"left out: takes {spec.seconds:.0f} s, and {deadline - time.monotonic():.0f} s of the budget are left"
            )
            _write(results, PartResult(spec.name, "skipped", notes=[note]))
            continue
        with torch.inference_mode():
            result = run_part(spec, Bench(device, deadline, shared, job.options))
        shared |= result.shared
        _write(results, result)
        if is_lost(device):
            return DEVICE_LOST
    return 0


def _write(results: TextIO, result: PartResult) -> None:
    results.write(json.dumps(result.to_json()) + "\n")
    results.flush()


def main() -> None:
    """Read the job, run it."""
    values = json.load(sys.stdin)
    job = Job(**{**values, "parts": [PartSpec(**spec) for spec in values["parts"]]})
    # What libraries print must not get between the results.
    with os.fdopen(os.dup(1), "w") as results:
        os.dup2(2, 1)
        code = run_job(job, results)
    sys.stdout.flush()
    os._exit(code)  # a lost device can hang in its own clean-up


if __name__ == "__main__":
    main()
