"""The service that is measured, its neighbours, Redis: real processes, and the CPU time and memory of each."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import psutil
import redis

from scalellm.launcher.health import Probe
from scalellm.launcher.redis_server import choose_socket, find_redis_server, redis_command, remove_scratch
from scalellm.services.common.health_check import SERVING

_START_LIMIT = 120.0
_ROLES = {"scalellm.services.tokenizer.worker": "worker", "scalellm.services.executor.engine_process": "engine"}


class BenchError(Exception):
    """The measurement cannot go on; the message says why."""


def family(pid: int) -> list[psutil.Process]:
    """The process and its offspring. Raises psutil.NoSuchProcess."""
    main = psutil.Process(pid)
    return [main, *main.children(recursive=True)]


def service_module(process: psutil.Process) -> str:
    """The module of `services` that a process runs; empty: none."""
    return next((word for word in process.cmdline() if word.startswith("scalellm.services.")), "")


def cpu_seconds(process: psutil.Process) -> float:
    """User and system time since the process began, of all its threads, ended ones included."""
    try:
        # Linux' clock of another process (clock_getcpuclockid) counts nanoseconds; psutil counts ticks of 10 ms.
        return time.clock_gettime(((~process.pid) << 3) | 2)
    except OSError:
        times = process.cpu_times()
        return times.user + times.system


def memory_bytes(process: psutil.Process) -> int:
    """Return the memory that would be free without the process."""
    return int(process.memory_full_info().uss)


class Service:
    """One service, as an operator would start it, on a free port.

    Args:
        name: `tokenizer`, `scheduler` or `executor`; or another module of `package`.
        flags: Flags of its command line.
        folder: For its log.
        package: Package of the module.

    Attributes:
        address: host:port of its gRPC.
        http_address: The same of its HTTP, where it has one.
    """

    def __init__(self, name: str, flags: tuple[str, ...], folder: Path, package: str = "scalellm.services") -> None:
        self.name = name
        number = len(list(folder.iterdir()))
        if name == "tokenizer" and package == "scalellm.services":
            flags = ("--http-port", "0", *flags)
        self._log = folder / f"{name}-{number}.log"
        announced = folder / f"{name}-{number}.address"
        with self._log.open("wb") as log:
            self._popen = subprocess.Popen(
                [sys.executable, "-m", f"{package}.{name}", "--port", "0", "--announce", str(announced), *flags],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + _START_LIMIT
        while not announced.exists():
            if self._popen.poll() is not None or time.monotonic() > deadline:
                self.close()
                raise BenchError(f"the {name} did not start:\n{self._log.read_text()[-2000:]}")
            time.sleep(0.02)
        self.address, *others = announced.read_text().split()
        self.http_address = next((line.removeprefix("http=") for line in others if line.startswith("http=")), "")
        if name == "executor":  # it listens before its model is loaded
            with Probe(self.address) as probe:
                while probe.health() != SERVING:
                    if self._popen.poll() is not None or time.monotonic() > deadline:
                        self.close()
                        raise BenchError(f"the {name} did not become ready:\n{self._log.read_text()[-2000:]}")
                    time.sleep(0.02)

    @property
    def processes(self) -> dict[str, list[psutil.Process]]:
        """The processes by role: the service's own name, `worker`, `engine`."""
        main, *offspring = family(self._popen.pid)
        found = {self.name: [main]}
        for child in offspring:
            found.setdefault(_ROLES.get(service_module(child), self.name), []).append(child)
        return found

    @property
    def log(self) -> str:
        """Return the service's log."""
        return self._log.read_text()

    def close(self) -> None:
        """Stop it at once."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in reversed(family(self._popen.pid)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self._popen.wait()


class Neighbour:
    """A simulated neighbour in a process of its own; `options` are its constructor's."""

    def __init__(self, role: str, **options: Any) -> None:
        self.role = role
        self._popen = subprocess.Popen(
            [sys.executable, "-m", "bench.services.neighbours"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.process = psutil.Process(self._popen.pid)
        self.addresses: list[str] = self._ask({"role": role, "options": options})["addresses"]

    def start(self, **load: Any) -> None:
        """Begin to load the service."""
        self._ask({"do": "start", **load})

    def take(self) -> dict[str, Any]:
        """Return the counts since the last call."""
        return self._ask({"do": "take"})

    def stop(self) -> None:
        """Take the load away."""
        self._ask({"do": "stop"})

    def close(self) -> None:
        """End the process."""
        if self._popen.stdin is not None:
            self._popen.stdin.close()
        try:
            self._popen.wait(60)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()

    def _ask(self, command: Mapping[str, Any]) -> dict[str, Any]:
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        self._popen.stdin.write(json.dumps(command).encode() + b"\n")
        self._popen.stdin.flush()
        line = self._popen.stdout.readline()
        if not line:
            raise BenchError(f"the simulated {self.role} ended with exit code {self._popen.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


@dataclass
class RedisServer:
    """A Redis of the bench's own."""

    url: str
    process: psutil.Process
    client: redis.Redis

    def totals(self) -> dict[str, float]:
        """Commands and CPU microseconds since start."""
        info: dict[str, Any] = self.client.info("stats")
        return {"Redis commands": info["total_commands_processed"], "Redis µs": 1e6 * cpu_seconds(self.process)}


class Workplace:
    """Starts processes and ends them all. A context manager."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="scalellm-bench-")))
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def service(self, name: str, *flags: str, package: str = "scalellm.services") -> Service:
        """Start a service and wait until it is ready."""
        service = Service(name, flags, self._folder, package)
        self._stack.callback(service.close)
        return service

    def neighbour(self, role: str, **options: Any) -> Neighbour:
        """Start a simulated neighbour."""
        neighbour = Neighbour(role, **options)
        self._stack.callback(neighbour.close)
        return neighbour

    def redis(self) -> RedisServer:
        """Start a Redis."""
        return self._stack.enter_context(_redis(self._folder))


@contextlib.contextmanager
def _redis(folder: Path) -> Iterator[RedisServer]:
    socket, scratch = choose_socket(folder)
    popen = subprocess.Popen(
        redis_command(find_redis_server(), socket, folder), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + _START_LIMIT
        while not socket.exists():
            if popen.poll() is not None or time.monotonic() > deadline:
                raise BenchError("redis-server did not start")
            time.sleep(0.01)
        url = f"unix://{os.fspath(socket)}"
        yield RedisServer(url, psutil.Process(popen.pid), redis.Redis.from_url(url))
    finally:
        popen.terminate()
        popen.wait()
        remove_scratch(scratch)
