"""The process that runs parts: `python -m bench.gpu.worker`, a job on standard input, a JSON line for each finding.

A process of its own, because an illegal access by one kernel ends the CUDA context for good, and takes along every
part that comes after it in the same process.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from dataclasses import dataclass, field
from typing import Any, TextIO

from bench.gpu.device import CudaDevice, Device, DryRunDevice
from bench.gpu.part import DEVICE_LOST, Bench, Findings, Kind, Part, PartSpec, State, UnavailableError

_PR_SET_PDEATHSIG = 1  # of Linux
_UNLIMITED = 1e6  # seconds: a dry run shows that everything is run, however busy the machine is


@dataclass(frozen=True, slots=True)
class Job:
    """The parts to run and their arguments."""

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


class Reporter:
    """Writes a line for each finding of a part when it is found; several threads of a part may find something."""

    def __init__(self, results: TextIO, part: str) -> None:
        self._results = results
        self._part = part
        self._lock = threading.Lock()

    def __call__(self, kind: Kind, value: dict[str, Any]) -> None:
        """Write one."""
        line = json.dumps({"part": self._part, "kind": kind, "value": value})
        with self._lock:
            self._results.write(line + "\n")
            self._results.flush()


def part_of(spec: PartSpec) -> Part:
    """Import a part and make it.

    Raises:
        UnavailableError: this machine's Python lacks a package of the services, which the part of ranks imports.
    """
    try:
        part: Part = getattr(importlib.import_module(spec.module), spec.attribute)()
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("bench", "scalellm"):
            raise
        raise UnavailableError(f"{spec.name}: {error.name} is not installed here") from error
    return part


def run_part(spec: PartSpec, bench: Bench, found: Findings) -> tuple[State, str | None]:
    """Run one part and return how it ended, and the error that ended it; whatever it raises is that."""
    try:
        part_of(spec).run(bench, found)
        bench.device.synchronize()
    except UnavailableError as error:
        found.note(str(error))
        return ("failed" if found.failed else "skipped"), None
    except Exception as error:
        traceback.print_exc()
        return "failed", f"{type(error).__name__}: {error}"[:2000]
    return ("failed" if found.failed else "passed"), None


def is_lost(device: Device) -> bool:
    """True if an error of the device has ended this process's use of it."""
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
            report = Reporter(results, spec.name)
            report("begin", {"seconds": 0.0})
            report("end", {"state": "failed", "seconds": 0.0, "error": str(error)})
        return 0
    gc.freeze()  # what was imported is not looked through again at every release of memory
    for i, spec in enumerate(job.parts):
        left = deadline - time.monotonic()
        share = _UNLIMITED if job.dry_run else share_of(left, job.parts[i:])
        report = Reporter(results, spec.name)
        report("begin", {"seconds": max(0, round(share))})
        if share < spec.seconds / 2 and not job.dry_run:
            report(
                "note", {"text": f"left out: takes {spec.seconds:.0f} s, and its share of the budget is {share:.0f} s"}
            )
            report("end", {"state": "skipped", "seconds": 0.0, "error": None})
            continue

        def take(kind: Kind, value: dict[str, Any], report: Reporter = report) -> None:
            if kind == "shared":
                shared.update(value)
            report(kind, value)

        start = time.monotonic()
        options = {**spec.options, **job.options}
        with torch.inference_mode():
            state, failure = run_part(spec, Bench(device, start + share, shared, options), Findings(take))
        seconds = round(time.monotonic() - start, 2)
        report("end", {"state": state, "seconds": seconds, "error": failure})
        if is_lost(device):
            return DEVICE_LOST
    return 0


def share_of(seconds: float, parts: list[PartSpec]) -> float:
    """Return what the first of the parts may take of the seconds that are left for all of them.

    What it does not take is there for the others, and what it would take beyond is not taken from them.
    """
    total = sum(spec.seconds for spec in parts)
    return seconds * parts[0].seconds / total if total else seconds


def die_with_parent() -> None:
    """Have the kernel end this process when the thread that started it ends, however that does: a GPU is not shared
    with what is left of a run that was killed.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    """Read the job, run it."""
    die_with_parent()
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
