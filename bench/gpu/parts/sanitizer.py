"""The kernels under NVIDIA's compute-sanitizer: accesses outside of memory, and races in shared memory."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from glob import glob
from pathlib import Path

from bench.gpu.part import Bench, Findings, UnavailableError
from bench.gpu.supervisor import worker_environment

_ROOT = Path(__file__).resolve().parents[3]
# Where CUDA puts it, when that is not on the PATH.
_PLACES = (
    "/usr/local/cuda*/bin",
    "/usr/local/cuda*/compute-sanitizer",
    "/opt/nvidia/*/compute-sanitizer",
    "/opt/cuda/*",
)
_TOOLS = (("memcheck", 90.0), ("racecheck", 60.0))
_ERROR_CODE = 86
_REFUSALS = ("Device not supported", "Unable to find injection library", "Target application terminated before first")
_SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)")


@dataclass(frozen=True, slots=True)
class Verdict:
    """The verdict of one tool: `clean` is None when it refused to work here."""

    clean: bool | None
    detail: str


class ComputeSanitizer:
    """Runs `bench.gpu.sanitized` under each tool; a dry run runs it under none."""

    def run(self, bench: Bench, found: Findings) -> None:
        """Add a row and a check for each tool.

        Raises:
            UnavailableError: the program is not there or does not work on this device.
        """
        prefixes = self._prefixes(bench)
        for tool, seconds in _TOOLS[:1] if bench.device.dry_run else _TOOLS:
            left = bench.seconds_left()
            if left < seconds / 2 and not bench.device.dry_run:
                found.note(f"{tool}: left out: {left:.0f} s of the budget are left")
                continue
            verdict = self._watch(
                prefixes[tool], left if bench.device.dry_run else min(seconds, left), dry_run=bench.device.dry_run
            )
            if verdict.clean is None:
                if not found.num_rows:
                    raise UnavailableError(f"compute-sanitizer {tool}: {verdict.detail}")
                found.note(f"{tool}: {verdict.detail}")
                continue
            found.row(tool=tool, result=verdict.detail)
            found.check(f"compute-sanitizer {tool}", verdict.clean, verdict.detail)

    @staticmethod
    def _prefixes(bench: Bench) -> dict[str, list[str]]:
        if bench.device.dry_run:
            return {tool: [] for tool, _ in _TOOLS}
        program = find_sanitizer()
        if program is None:
            raise UnavailableError("compute-sanitizer is neither on the PATH nor where CUDA puts it")
        # Calls of the driver that fail are torch's and Triton's ways of asking, and programs that these start (ptxas, a
        # C compiler) have nothing on the device to watch.
        options = ["--error-exitcode", str(_ERROR_CODE), "--report-api-errors", "no"]
        options += ["--target-processes", "application-only"]
        return {tool: [program, "--tool", tool, *options] for tool, _ in _TOOLS}

    @staticmethod
    def _watch(prefix: list[str], seconds: float, *, dry_run: bool) -> Verdict:
        command = [*prefix, sys.executable, "-m", "bench.gpu.sanitized", *(["--dry-run"] if dry_run else [])]
        environment = worker_environment(dry_run=dry_run) | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        with subprocess.Popen(
            command,
            cwd=_ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        ) as process:
            try:
                output, _ = process.communicate(timeout=max(1.0, seconds))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # the tool runs the program as a process of its own
                return Verdict(None, f"did not end within {seconds:.0f} s")
        return judge(process.returncode, output, watched=bool(prefix))


def judge(code: int, output: str, *, watched: bool) -> Verdict:
    """Make out what a run's exit code and output say."""
    refusal = next((text for text in _REFUSALS if text in output), None)
    if refusal is not None:
        return Verdict(None, f"refused to work here: {refusal}")
    summary = _SUMMARY.search(output)
    if code == 0 and (summary is not None or not watched):
        count = int(summary[1]) if summary else 0
        return Verdict(count == 0, f"{count} errors" if watched else "ran, watched by nothing")
    tail = " | ".join(output.strip().splitlines()[-8:])
    return Verdict(False, f"exit code {code}: {tail}"[:1500])


def find_sanitizer() -> str | None:
    """Return the path of compute-sanitizer, or None."""
    found = shutil.which("compute-sanitizer")
    if found is not None:
        return found
    candidates = [path for place in _PLACES for path in sorted(glob(f"{place}/compute-sanitizer"), reverse=True)]
    return next((path for path in candidates if Path(path).is_file()), None)
