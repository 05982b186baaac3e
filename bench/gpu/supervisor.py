"""Runs parts in worker processes: one that dies, hangs or loses the device is replaced, and costs only its own part."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.gpu.part import DEVICE_LOST, Kind, PartResult, PartSpec

_ROOT = Path(__file__).resolve().parents[2]
_START = 240.0  # seconds for a worker to import torch and open the device
_BETWEEN = 60.0  # from a part's end to the begin of the next
_GRACE = 15.0  # past a part's share of the budget, for the case in progress
_LONGEST_WAIT = 1.0  # see `_next_line`

Listener = Callable[[str, Kind, dict[str, Any]], None]
"""Is told of each finding as it comes: the part's name, what it is, and its values."""


class Supervisor:
    """Runs parts within a budget of seconds, beginning now.

    `results` are those of all parts begun so far and can be read at any time: of a part in progress, and of one that
    was stopped, they have what it had found.
    """

    def __init__(
        self,
        *,
        dry_run: bool,
        budget_s: float,
        listen: Listener = lambda part, kind, value: None,
    ) -> None:
        self._dry_run = dry_run
        self._deadline = time.monotonic() + budget_s
        self._listen = listen
        self.results: list[PartResult] = []

    def run(
        self,
        parts: Sequence[PartSpec],
        *,
        shared: dict[str, Any] | None = None,
        options: dict[str, Any] | None = None,
    ) -> list[PartResult]:
        """Run the parts in order and return how each ended."""
        left = list(parts)
        while left:
            known = dict(shared or {})
            for result in self.results:
                known |= result.shared
            job = {
                "parts": [spec.to_json() for spec in left],
                "dry_run": self._dry_run,
                "seconds": self._deadline - time.monotonic(),
                "shared": known,
                "options": options or {},
            }
            left = self._work(left, job)
        return self.results

    def _work(self, parts: list[PartSpec], job: dict[str, Any]) -> list[PartSpec]:
        """Have one worker run parts; returns those that are left for another."""
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
            try:
                process.stdin.write(json.dumps(job))
                process.stdin.close()
                return self._follow(process, lines, parts)
            finally:
                process.kill()

    def _follow(
        self, process: subprocess.Popen[str], lines: queue.Queue[str | None], parts: list[PartSpec]
    ) -> list[PartSpec]:
        """Take what a worker finds until it has run all parts, dies, or is silent for too long."""
        left = list(parts)
        running: PartResult | None = None
        since, limit = time.monotonic(), _START
        while left:
            try:
                line = _next_line(lines, since + limit)
            except queue.Empty:
                self._give_up(running or self._begin(left[0].name), since, f"stopped: did not end in {limit:.0f} s")
                return left[1:]
            if line is None:
                code = process.wait()
                if running is None and code == DEVICE_LOST and len(left) < len(parts):
                    return left  # the part that lost it has ended
                self._give_up(running or self._begin(left[0].name), since, f"its process ended with code {code}")
                return left[1:]
            event = json.loads(line)
            kind, value = event["kind"], event["value"]
            if running is None:
                running = self._begin(event["part"])
                most = value["seconds"] if self._dry_run else min(left[0].timeout, value["seconds"])
                since, limit = time.monotonic(), most + _GRACE
            self._tell(running, kind, value)
            if kind == "end":
                left, running = left[1:], None
                since, limit = time.monotonic(), _BETWEEN
        return left

    def _begin(self, part: str) -> PartResult:
        self.results.append(PartResult(part))
        return self.results[-1]

    def _give_up(self, result: PartResult, since: float, error: str) -> None:
        seconds = round(time.monotonic() - since, 2)
        self._tell(result, "end", {"state": "failed", "seconds": seconds, "error": error})

    def _tell(self, result: PartResult, kind: Kind, value: dict[str, Any]) -> None:
        result.take(kind, value)
        self._listen(result.name, kind, value)


def worker_environment(*, dry_run: bool) -> dict[str, str]:
    """Return the environment of a worker. Triton decides at import whether it interprets."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment.setdefault("TRITON_CACHE_DIR", str(_ROOT / "build/gpu/triton"))
    if dry_run:
        environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return environment


def _next_line(lines: queue.Queue[str | None], deadline: float) -> str | None:
    """Return the next line of a worker, or None at its end.

    Waits in short pieces: a signal that comes just before a wait, or to another thread, does not interrupt the wait,
    and Python calls its handler only after it.

    Raises:
        queue.Empty: there was none until the deadline, in seconds of the monotonic clock.
    """
    while True:
        left = deadline - time.monotonic()
        try:
            return lines.get(timeout=min(max(0.0, left), _LONGEST_WAIT))
        except queue.Empty:
            if left <= _LONGEST_WAIT:
                raise


def _read_lines(stream: Any, lines: queue.Queue[str | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)
