"""A Redis that can be killed, starved and started again with what it had written."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from service_processes import PATIENCE, redis_server

_DISK = "512m"
"""Size of the server's file system. Sessions stay for an hour: 15 minutes of a soak left a file of 26 MB, which needs
its place twice while Redis writes it anew. 64 MiB were full after 37 minutes, and Redis could not be started again.
"""


class FaultRedis:
    """Redis on a Unix socket that stays the same over restarts; it keeps an append-only file.

    Where mounting is allowed the file lies in a small file system of the server's own, which can be filled. A process
    that does nothing else keeps that mounted.
    """

    def __init__(self, folder: Path) -> None:
        self.socket = f"/tmp/scalellm-faults-{uuid.uuid4().hex[:12]}.sock"
        self.folder = folder / "redis"
        self.folder.mkdir()
        self._log = folder / "redis.log"
        self.can_fill = _may_mount()
        self._disk: subprocess.Popen[bytes] | None = None
        if self.can_fill:
            mount = ["sh", "-c", f'mount -t tmpfs -o size={_DISK} tmpfs "$0" && exec sleep infinity', str(self.folder)]
            self._disk = subprocess.Popen(["unshare", "--mount", *mount])
            _wait_for(lambda: self._inside().stat().st_dev != self.folder.stat().st_dev, "the disk is not mounted")
        self.start()

    def start(self) -> None:
        flags = [redis_server(), "--port", "0", "--unixsocket", self.socket, "--save", "", "--appendonly", "yes"]
        # The file is written anew long before it fills that file system: Redis' own limit is 64 MiB.
        flags += ["--dir", str(self.folder), "--appendfsync", "everysec", "--auto-aof-rewrite-min-size", "8mb"]
        if self._disk is not None:
            flags = ["nsenter", f"--mount=/proc/{self._disk.pid}/ns/mnt", *flags]
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(flags, stdout=log, stderr=log)
        _wait_for(self._answers, f"redis-server did not start, see {self._log}")

    def _inside(self) -> Path:
        """The folder as the server sees it."""
        assert self._disk is not None
        return Path(f"/proc/{self._disk.pid}/root{self.folder}")

    @property
    def pid(self) -> int:
        return self.process.pid

    def restart(self) -> None:
        self.process.wait(PATIENCE)
        self.start()

    def command(self, *words: str) -> str:
        """Send a command and return the answer as `redis-cli --raw` would print it: errors as their text."""
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(PATIENCE)
            client.connect(self.socket)
            parts = [word.encode() for word in words]
            client.sendall(b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%s\r\n" % (len(p), p) for p in parts))
            return _read_reply(client.makefile("rb"))

    def keys_without_ttl(self) -> list[str]:
        """Keys that nobody would ever remove."""
        return [key for key in self.command("KEYS", "*").splitlines() if key and self.command("TTL", key) == "-1"]

    def fill_disk(self) -> Callable[[], None]:
        """Leave no byte for the append-only file; returns what undoes it."""
        waste = self._inside() / "waste"
        with suppress(OSError), waste.open("wb", buffering=0) as stream:
            while True:
                stream.write(bytes(2**16))
        with suppress(OSError), waste.open("ab", buffering=0) as stream:
            while True:
                stream.write(b"0")
        return waste.unlink

    def stop(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGCONT)
            self.process.kill()
        self.process.wait(PATIENCE)
        if self._disk is not None:
            self._disk.kill()
            self._disk.wait(PATIENCE)
        Path(self.socket).unlink(missing_ok=True)

    def _answers(self) -> bool:
        try:
            return self.command("PING") == "PONG"
        except OSError:
            return False


def _wait_for(condition: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.01)


def _may_mount() -> bool:
    """True if a process may mount a file system of its own."""
    if shutil.which("unshare") is None:
        return False
    mount = ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/tmp"]
    return subprocess.run(mount, capture_output=True, check=False).returncode == 0


def _read_reply(stream) -> str:
    kind, rest = (line := stream.readline())[:1], line[1:].strip().decode(errors="replace")
    if kind == b"$":
        length = int(rest)
        return stream.read(length + 2)[:-2].decode(errors="replace") if length >= 0 else ""
    if kind == b"*":
        return "\n".join(_read_reply(stream) for _ in range(int(rest)))
    return rest
