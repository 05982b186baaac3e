"""The parent process: starts the workers, starts a crashed one again, and ends them all."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from services.common.child_environment import EXPORT, child_environment
from services.common.lifecycle import StartError
from services.tokenizer.config import TokenizerSettings

_log = logging.getLogger(__name__)

_CRASH_WINDOW = 60.0
_FIRST_DELAY = 0.1
_KILL_MARGIN = 5.0
"""Seconds beyond the drain limit that a worker gets to end by itself."""


class Supervisor:
    """Keeps the workers running.

    Args:
        settings: The service's.
        port: The port that is reserved for the workers.
        http_port: The same for HTTP; None: they do not serve it.
        metrics_folder: Where the workers write their metrics; None = nowhere.
        on_crash: Called with the pid of each worker that crashed.
    """

    def __init__(
        self,
        settings: TokenizerSettings,
        port: int,
        http_port: int | None = None,
        metrics_folder: Path | None = None,
        on_crash: Callable[[int], None] = lambda pid: None,
    ) -> None:
        self._settings = settings
        self._ports = {"port": port, "http_port": http_port}
        self._on_crash = on_crash
        self._environment = child_environment(os.environ, EXPORT)
        # The workers are the parallelism; a tokenizer that starts threads of its own would fight its neighbours.
        self._environment.setdefault("TOKENIZERS_PARALLELISM", "false")
        if metrics_folder is not None:
            # prometheus_client takes it from the environment, at import.
            self._environment["PROMETHEUS_MULTIPROC_DIR"] = str(metrics_folder)
        self._processes: dict[int, asyncio.subprocess.Process] = {}
        self._serving: set[int] = set()
        self._stop = asyncio.Event()

    @property
    def worker_pids(self) -> dict[str, int]:
        """The workers that run, by name."""
        return {f"worker-{index}": process.pid for index, process in self._processes.items()}

    async def run(self, on_ready: Callable[[], None]) -> None:
        """Keep all workers running until `stop`.

        Args:
            on_ready: Called once, when all workers serve for the first time.

        Raises StartError when a worker cannot start or keeps crashing.
        """
        slots = [asyncio.create_task(self._keep(index, on_ready)) for index in range(self._settings.workers)]
        try:
            await asyncio.gather(*slots)
        finally:
            for slot in slots:
                slot.cancel()
            await asyncio.gather(*slots, return_exceptions=True)
            await self._kill_all()

    async def stop(self) -> None:
        """Let the workers drain and end; kill what is not gone in time. `run` returns after that."""
        self._stop.set()
        for process in self._processes.values():
            if process.returncode is None:
                process.terminate()
        try:
            async with asyncio.timeout(self._settings.drain_limit_s + _KILL_MARGIN):
                await asyncio.gather(*(process.wait() for process in self._processes.values()))
        except TimeoutError:
            _log.error("a worker does not end; killing it")
            await self._kill_all()

    async def _keep(self, index: int, on_ready: Callable[[], None]) -> None:
        crashes: deque[float] = deque()
        while not self._stop.is_set():
            process = await self._spawn()
            self._processes[index] = process
            if self._stop.is_set():
                process.terminate()
            if await _serves(process):
                is_news = index not in self._serving
                self._serving.add(index)
                if is_news and len(self._serving) == self._settings.workers:
                    on_ready()
            code = await process.wait()
            if self._stop.is_set():
                return
            self._on_crash(process.pid)
            now = time.monotonic()
            crashes.append(now)
            while crashes[0] < now - _CRASH_WINDOW:
                crashes.popleft()
            if len(crashes) > self._settings.max_worker_restarts:
                raise StartError(
                    f"worker {index} ended {len(crashes)} times within a minute, the last time with "
                    f"{_describe_exit(code)}; its log lines are above"
                )
            _log.error("worker %d (pid %d) ended with %s; starting it again", index, process.pid, _describe_exit(code))
            await asyncio.sleep(_FIRST_DELAY * 2 ** (len(crashes) - 1))

    async def _spawn(self) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "services.tokenizer.worker",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=self._environment,
            # Ctrl-C goes to the terminal's whole process group; the workers are told by us.
            start_new_session=True,
        )
        assert process.stdin is not None
        # Not on the command line: the settings may hold secrets.
        assignment = {"settings": self._settings.model_dump(mode="json"), **self._ports}
        process.stdin.write(json.dumps(assignment).encode() + b"\n")
        return process

    async def _kill_all(self) -> None:
        for process in self._processes.values():
            if process.returncode is None:
                process.kill()
            await process.wait()


async def _serves(process: asyncio.subprocess.Process) -> bool:
    """Wait for a worker's first report. False when it ended without one; raises StartError when it cannot start."""
    assert process.stdout is not None
    line = await process.stdout.readline()
    if not line:
        return False
    report: dict[str, str] = json.loads(line)
    if "error" in report:
        raise StartError(report["error"])
    return True


def _describe_exit(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
