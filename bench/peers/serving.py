"""A server as a process of its own: its start, its memory, its end."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import ProxyHandler, build_opener

import psutil

from bench.peers.environments import PeerError
from bench.services.processes import cpu_seconds, family

_POLL_S = 0.1
_MEMORY_POLL_S = 0.25
_END_S = 10.0
_LAST_LINES = 12


def free_port() -> int:
    """A port of the loopback interface on which nobody listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def server(
    command: Sequence[str], environment: Mapping[str, str], log: Path, url: str, limit_s: float
) -> Iterator[int]:
    """Run a server; gives its pid once `url` answers. Raises PeerError with the log's end when it does not."""
    with log.open("wb") as output:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                cwd=log.parent,
                start_new_session=True,
            )
        except OSError as error:
            raise PeerError(f"{command[0]}: {error.strerror}") from None
    try:
        _await_answer(process, url, log, limit_s)
        yield process.pid
    finally:
        _end(process)


class Resources:
    """Peak memory and CPU time of process trees, measured from entering to leaving the context.

    Args:
        roots: Gives the pids whose offspring counts with them.
    """

    def __init__(self, roots: Callable[[], Sequence[int]]) -> None:
        self._roots = roots
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="resources", daemon=True)
        self.peak_bytes = 0.0
        """Most resident memory of all together; pages that processes share count in each."""
        self.others_cores = 0.0
        """Cores that were busy with neither these processes nor this one: another user of the machine."""

    def __enter__(self) -> Resources:
        self._start = self._clocks()
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._over.set()
        self._thread.join()
        wall, machine, known = (end - start for start, end in zip(self._start, self._clocks(), strict=True))
        self.others_cores = max(0.0, (machine - known) / max(wall, 1e-9))

    def _watch(self) -> None:
        while not self._over.is_set():
            self.peak_bytes = max(self.peak_bytes, sum(_of(process, _rss) for process in self._processes()))
            self._over.wait(_MEMORY_POLL_S)

    def _clocks(self) -> tuple[float, float, float]:
        """Seconds: wall, busy CPU of the machine, CPU of the trees and this process."""
        times = psutil.cpu_times()
        idle = times.idle + getattr(times, "iowait", 0.0)
        busy = sum(times) - idle - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
        own = sum(_of(process, cpu_seconds) for process in (*self._processes(), psutil.Process()))
        return time.monotonic(), busy, own

    def _processes(self) -> list[psutil.Process]:
        found: list[psutil.Process] = []
        for pid in self._roots():
            with contextlib.suppress(psutil.Error):
                found += family(pid)
        return found


def _rss(process: psutil.Process) -> float:
    return float(process.memory_info().rss)


def _of(process: psutil.Process, read: Callable[[psutil.Process], float]) -> float:
    try:
        return read(process)
    except psutil.Error:
        return 0.0


def _await_answer(process: subprocess.Popen[bytes], url: str, log: Path, limit_s: float) -> None:
    opener = build_opener(ProxyHandler({}))
    deadline = time.monotonic() + limit_s
    while True:
        try:
            with opener.open(url, timeout=5) as answer:
                if answer.status == 200:
                    return
        except (URLError, OSError):
            pass
        how = None
        if process.poll() is not None:
            how = f"ended with {process.returncode} while starting"
        elif time.monotonic() > deadline:
            how = f"did not answer at {url} after {limit_s:.0f} s"
        if how is not None:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-_LAST_LINES:])
            raise PeerError(f"the server {how} (log: {log}):\n{tail}")
        time.sleep(_POLL_S)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask it to end, then kill what is left of its session."""
    tree: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        tree = family(process.pid)
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_END_S)
    for left in reversed(tree):
        with contextlib.suppress(psutil.Error):
            left.kill()
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
