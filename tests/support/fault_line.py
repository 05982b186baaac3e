"""A whole line of real processes that can be killed, stopped, cut off and started again at the same addresses."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil

from fault_wires import Wire, Wires
from line import scrape
from scalellm.v1 import executor_pb2, executor_pb2_grpc, scheduler_pb2, scheduler_pb2_grpc
from service_processes import PATIENCE, ServiceProcess, Spawn, redis_server, spawner

STALL_LIMIT = 15.0
"""Seconds of silence after which a service with work counts as dead: longer than a process is stopped, shorter than a
wire is cut."""

DRAIN_LIMIT = 1
"""Seconds that running requests are given on SIGTERM: shorter than the streams are."""


ENGINES = {
    "fake": ("--engine", "fake", "--fake-preset", "h200-llama-8b", "--num-blocks", "2048", "--max-num-seqs", "64"),
    "model": ("--engine", "model", "--num-blocks", "512", "--max-num-seqs", "16"),
}


@dataclass(frozen=True)
class Shape:
    """How many processes of each service there are; in short: tokenizers, schedulers, executors."""

    executors: int = 2
    schedulers: int = 1
    tokenizers: int = 1
    workers: int = 2

    def __str__(self) -> str:
        return f"{self.tokenizers}-{self.schedulers}-{self.executors}"


class Member:
    """One service: its process, which may be another one after a restart, and the wire by which others reach it."""

    def __init__(self, name: str, start: Callable[[bool], ServiceProcess], wire: Wire | None) -> None:
        self.name = name
        self.wire = wire
        self._start = start
        self.process = start(True)

    @property
    def kind(self) -> str:
        return self.name.partition(" ")[0]

    def child(self, module: str) -> psutil.Process:
        """A process below it that runs this module."""
        deadline = time.monotonic() + PATIENCE
        while True:
            for child in self.process.children():
                with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                    if module in child.cmdline():
                        return child
            assert time.monotonic() < deadline, f"{self.name} runs no {module}:\n{self.process.log.read_text()[-4000:]}"
            time.sleep(0.05)

    def family(self) -> list[psutil.Process]:
        return [psutil.Process(self.process.pid), *self.process.children()]

    def restart(self) -> None:
        """Start it again at the same address, once what was there has ended."""
        self.process.process.wait(PATIENCE)
        self.process = self._start(True)


class FaultRedis:
    """Redis on a Unix socket that stays the same over restarts; it keeps an append-only file.

    Where mounting is allowed the file lies in a small file system of the server's own, which can be filled. A process
    that does nothing else keeps that mounted.
    """

    def __init__(self, folder: Path) -> None:
        self.socket = f"/tmp/scalellm-faults-{uuid.uuid4().hex[:12]}.sock"
        self.folder = folder / "redis"
        self.folder.mkdir()
        self.can_fill = _may_mount()
        self._disk: subprocess.Popen[bytes] | None = None
        if self.can_fill:
            mount = ["sh", "-c", 'mount -t tmpfs -o size=16m tmpfs "$0" && exec sleep infinity', str(self.folder)]
            self._disk = subprocess.Popen(["unshare", "--mount", *mount])
            _wait_for(lambda: self._inside().stat().st_dev != self.folder.stat().st_dev, "the disk is not mounted")
        self.start()

    def start(self) -> None:
        flags = [redis_server(), "--port", "0", "--unixsocket", self.socket, "--save", "", "--appendonly", "yes"]
        flags += ["--dir", str(self.folder), "--appendfsync", "everysec"]
        if self._disk is not None:
            flags = ["nsenter", f"--mount=/proc/{self._disk.pid}/ns/mnt", *flags]
        self.process = subprocess.Popen(flags, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _wait_for(self._answers, "redis-server did not start")

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
        """What the server answers, as redis-cli would print it raw: errors as their text."""
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


class FaultLine:
    """All services of a shape. Whoever breaks something mends it."""

    def __init__(self, shape: Shape, spawn: Spawn, redis: FaultRedis, model: Path, wires: Wires, engine: str) -> None:
        self.shape = shape
        self.redis = redis
        self.redis_wire = wires.add(redis.socket)
        redis_url = f"redis://{self.redis_wire.address}/0"
        limits = ("--drain-limit-s", str(DRAIN_LIMIT), "--stall-limit-s", str(STALL_LIMIT), "--metrics-port", "0")

        def member(name: str, number: int, *flags: str, wired: bool = True) -> Member:
            port = _free_port()
            all_flags = ("--port", str(port), "--model", str(model), *limits, *flags)
            if name == "scheduler":
                all_flags = ("--port", str(port), *limits, *flags)
            start = lambda wait: spawn(name, *all_flags, wait=wait)  # noqa: E731
            return Member(f"{name} {number}", start, wires.add(f"127.0.0.1:{port}") if wired else None)

        engine_flags = (
            "--max-model-len",
            "4096",
            "--max-engine-restarts",
            "100",
            "--num-threads",
            "1",
            *ENGINES[engine],
        )
        self.executors = [member("executor", number, *engine_flags) for number in range(shape.executors)]
        executors = ",".join(_address(member) for member in self.executors)
        self.schedulers = [
            member("scheduler", number, "--executors", executors, "--redis-url", redis_url)
            for number in range(shape.schedulers)
        ]
        schedulers = ",".join(_address(member) for member in self.schedulers)
        edge_flags = ("--workers", str(shape.workers), "--max-worker-restarts", "100")
        self.tokenizers = [
            member("tokenizer", number, "--scheduler", schedulers, "--redis-url", redis_url, *edge_flags, wired=False)
            for number in range(shape.tokenizers)
        ]

    @property
    def members(self) -> list[Member]:
        return [*self.executors, *self.schedulers, *self.tokenizers]

    async def wait_linked(self) -> None:
        """Wait until every worker is linked to every scheduler, and every scheduler to every executor."""
        workers = self.shape.tokenizers * self.shape.workers
        wanted = {"tokenizer": workers, "executor": self.shape.executors}
        deadline = time.monotonic() + PATIENCE
        for member in self.schedulers:
            while True:
                found = await asyncio.to_thread(_links, member.process)
                if found == wanted:
                    break
                assert time.monotonic() < deadline, f"{member.name} has links {found}, not {wanted}"
                await asyncio.sleep(0.1)

    async def resubmitted(self) -> int:
        return sum([(await state_of(member)).resubmitted for member in self.schedulers])


async def state_of(scheduler: Member) -> scheduler_pb2.GetStateResponse:
    async with grpc.aio.insecure_channel(scheduler.process.address) as channel:
        request = scheduler_pb2.GetStateRequest()
        return await scheduler_pb2_grpc.SchedulerStub(channel).GetState(request, timeout=PATIENCE)


async def info_of(executor: Member) -> executor_pb2.GetExecutorInfoResponse:
    async with grpc.aio.insecure_channel(executor.process.address) as channel:
        request = executor_pb2.GetExecutorInfoRequest()
        return await executor_pb2_grpc.ExecutorStub(channel).GetInfo(request, timeout=PATIENCE)


@contextmanager
def fault_line(shape: Shape, folder: Path, model: Path, engine: str = "fake") -> Iterator[FaultLine]:
    """Start a line of this shape; it ends with the context."""
    with ExitStack() as stack:
        redis = FaultRedis(folder)
        stack.callback(redis.stop)
        wires = stack.enter_context(Wires())
        spawn = stack.enter_context(contextmanager(spawner)(folder))
        yield FaultLine(shape, spawn, redis, model, wires, engine)


def _links(scheduler: ServiceProcess) -> dict[str, float]:
    try:
        samples = scrape(scheduler)
    except OSError:
        return {}
    return {peer: samples[f'scalellm_scheduler_links{{peer="{peer}"}}'] for peer in ("tokenizer", "executor")}


def _address(member: Member) -> str:
    assert member.wire is not None
    return member.wire.address


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for(condition: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.01)


def _may_mount() -> bool:
    """Whether a process may have a file system of its own."""
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
