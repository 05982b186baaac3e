"""The parent process: starts the workers, restarts crashed ones, and stops them all."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from pathlib import Path

from scalellm.services.common.child_environment import EXPORT, child_environment
from scalellm.services.common.child_process import ChildProcess, Restarts, describe_exit, python_module
from scalellm.services.common.lifecycle import StartError
from scalellm.services.tokenizer.config import TokenizerSettings

_log = logging.getLogger(__name__)

_CRASH_WINDOW = 60.0
_KILL_MARGIN = 5.0
"""Seconds beyond the drain limit after which a worker that has not ended is killed."""


class Supervisor:
    """Keeps the workers running.

    Args:
        settings: Settings of the service.
        port: The port that is reserved for the workers.
        http_port: The port that is reserved for HTTP; None: HTTP is not served.
        metrics_folder: Folder of the workers' metrics; None = there are no metrics.
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
        # The workers provide the parallelism. Threads of the tokenizers library would compete with other workers.
        self._environment.setdefault("TOKENIZERS_PARALLELISM", "false")
        if metrics_folder is not None:
            # prometheus_client reads the variable at import.
            self._environment["PROMETHEUS_MULTIPROC_DIR"] = str(metrics_folder)
        self._processes: dict[int, ChildProcess] = {}
        self._serving: set[int] = set()
        self._stop = asyncio.Event()

    @property
    def worker_pids(self) -> dict[str, int]:
        """Process ids of the running workers, by name."""
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
        """Let the workers drain and end, and kill those that take too long. Then `run` returns."""
        self._stop.set()
        limit = self._settings.drain_limit_s + _KILL_MARGIN
        ended = await asyncio.gather(*(process.end(limit) for process in self._processes.values()))
        if not all(ended):
            _log.error("%d workers did not end in time and were killed", ended.count(False))

    async def _keep(self, index: int, on_ready: Callable[[], None]) -> None:
        restarts = Restarts(self._settings.max_worker_restarts, window=_CRASH_WINDOW)
        while not self._stop.is_set():
            process = await self._start()
            self._processes[index] = process
            if self._stop.is_set():
                process.terminate()
            if await self._serves(process):
                is_news = index not in self._serving
                self._serving.add(index)
                if is_news and len(self._serving) == self._settings.workers:
                    on_ready()
            code = await process.wait()
            if self._stop.is_set():
                return
            self._on_crash(process.pid)
            delay = restarts.crashed()
            if delay is None:
                raise StartError(
                    f"worker {index} ended {restarts.num_crashes} times within a minute, the last time with "
                    f"{describe_exit(code)}; its log lines are above"
                )
            _log.error("worker %d (pid %d) ended with %s; starting it again", index, process.pid, describe_exit(code))
            await asyncio.sleep(delay)

    async def _start(self) -> ChildProcess:
        # Ctrl-C in a terminal signals the whole process group, but the parent alone stops the workers.
        return await ChildProcess.start(
            python_module("scalellm.services.tokenizer.worker"), self._environment, own_session=True
        )

    async def _serves(self, process: ChildProcess) -> bool:
        """Wait for a worker's first report. False when it ended without one; raises StartError when it cannot start."""
        report = await process.ask({"settings": self._settings.model_dump(mode="json"), **self._ports})
        if report is not None and "error" in report:
            raise StartError(report["error"])
        return report is not None

    async def _kill_all(self) -> None:
        await asyncio.gather(*(process.kill() for process in self._processes.values()))
