"""Runs parts in worker processes: one that dies, hangs or loses the device is replaced, and costs only its own part."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.gpu.part import DEVICE_LOST, PartResult, PartSpec

_ROOT = Path(__file__).resolve().parents[2]
_START = 240.0  # seconds for a worker to import torch and open the device
_GRACE = 15.0  # seconds past the end of the budget for the part in progress


class Supervisor:
    """Runs parts within a budget of seconds, beginning now."""

    def __init__(self, *, dry_run: bool, budget_s: float) -> None:
        self._dry_run = dry_run
        self._deadline = time.monotonic() + budget_s

    def run(
        self,
        parts: Sequence[PartSpec],
        *,
        shared: dict[str, Any] | None = None,
        options: dict[str, Any] | None = None,
        on_result: Callable[[PartResult], None] = lambda result: None,
    ) -> list[PartResult]:
        """Run the parts in order and return how each ended; `on_result` hears of each as it ends."""
        known = dict(shared or {})
        done: list[PartResult] = []
        while len(done) < len(parts):
            rest = list(parts[len(done) :])
            job = {
                "parts": [asdict(spec) for spec in rest],
                "dry_run": self._dry_run,
                "seconds": self._deadline - time.monotonic(),
                "shared": known,
                "options": options or {},
            }
            for result in self._results(rest, job):
                known |= result.shared
                done.append(result)
                on_result(result)
        return done

    def _results(self, parts: list[PartSpec], job: dict[str, Any]) -> Iterator[PartResult]:
        """Yield results of one worker, the last one possibly that of the part it died of."""
        with subprocess.Popen(
            [sys.executable, "-m", "bench.gpu.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=_ROOT,
            env=worker_environment(dry_run=self._dry_run),
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            lines: queue.Queue[str | None] = queue.Queue()
            threading.Thread(target=_read_lines, args=(process.stdout, lines), daemon=True).start()
            process.stdin.write(json.dumps(job))
            process.stdin.close()
            extra = _START
            for i, spec in enumerate(parts):
                limit = min(spec.timeout, max(0.0, self._deadline - time.monotonic()) + _GRACE) + extra
                extra = 0.0
                try:
                    line = lines.get(timeout=limit)
                except queue.Empty:
                    process.kill()
                    yield PartResult(spec.name, "failed", limit, error=f"stopped: no result after {limit:.0f} s")
                    return
                if line is None:
                    code = process.wait()
                    if i == 0 or code != 0:
                        yield from self._after_end(spec, i, code)
                    return
                yield PartResult.from_json(json.loads(line))

    @staticmethod
    def _after_end(spec: PartSpec, place: int, code: int) -> Iterator[PartResult]:
        """A worker that ended before this part: by itself, having lost the device, or by what the part did."""
        if place == 0 or code != DEVICE_LOST:
            yield PartResult(spec.name, "failed", error=f"its process ended with code {code}")


def worker_environment(*, dry_run: bool) -> dict[str, str]:
    """Return the environment of a worker. Triton decides at import whether it interprets."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    if dry_run:
        environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return environment


def _read_lines(stream: Any, lines: queue.Queue[str | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)
