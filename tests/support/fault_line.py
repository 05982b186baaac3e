"""A whole line of real processes that can be killed, stopped, cut off and started again at the same addresses."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from fault_member import Member
from fault_namespace import Namespace
from fault_redis import FaultRedis
from fault_rest import Vitals, rest
from fault_wires import Wires
from line import scrape
from service_processes import ServiceProcess, Spawn, spawner

STALL_LIMIT = 15.0
"""Seconds of silence after which a service with work counts as dead: longer than a process is stopped, shorter than a
wire is cut."""

PATIENCE_LIMIT = 600.0
"""Seconds of silence where nothing is stopped or cut, and seconds that an engine may take to start: a step of a real
model, and loading it, may take minutes on a machine that does other work, too."""

DRAIN_LIMIT = 1
"""Seconds that running requests are given on SIGTERM: shorter than the streams are."""


ENGINES = {
    "fake": ("--engine", "fake", "--fake-preset", "h200-llama-8b", "--num-blocks", "2048", "--max-num-seqs", "64"),
    "model": ("--engine", "model", "--num-blocks", "512", "--max-num-seqs", "16"),
    "ranks": ("--engine", "model", "--num-blocks", "512", "--max-num-seqs", "16", "--tensor-parallel", "3"),
}

STALL_LIMITS = {"fake": STALL_LIMIT, "model": PATIENCE_LIMIT, "ranks": 60.0}

MEMORY_MARGINS = {"fake": 48 * 2**20, "model": 512 * 2**20, "ranks": 3 * 512 * 2**20}
"""Bytes by which a service's processes may have grown under a load that was run before: pools and arenas differ. A real
model's cache is memory, too, that is touched for the first time little by little."""


@dataclass(frozen=True)
class Shape:
    """Number of processes of each service; its short form is schedulers+executors.

    Attributes:
        on_cable: Kind of service whose first process has a network namespace of its own; empty: none.
    """

    executors: int = 2
    schedulers: int = 1
    tokenizers: int = 1
    workers: int = 2
    on_cable: str = ""

    def __str__(self) -> str:
        return f"{self.schedulers}+{self.executors}"


class FaultLine:
    """All services of a shape. Whoever breaks something mends it."""

    def __init__(
        self,
        shape: Shape,
        spawn: Spawn,
        redis: FaultRedis,
        model: Path,
        wires: Wires,
        engine: str,
        cable: Namespace | None,
    ) -> None:
        self.shape = shape
        self.cable = cable
        self.engine = engine
        self.redis = redis
        self.redis_wire = wires.add(redis.socket)
        redis_url = f"redis://{self.redis_wire.address}/0"
        stall_limit = str(STALL_LIMITS[engine])
        limits = ("--drain-limit-s", str(DRAIN_LIMIT), "--stall-limit-s", stall_limit, "--metrics-port", "0")
        leases = ("--lease-s", stall_limit)
        waits = () if engine == "fake" else ("--engine-restart-limit-s", str(PATIENCE_LIMIT))

        def member(name: str, number: int, *flags: str, wired: bool = True) -> Member:
            port = _free_port()
            own = () if name == "scheduler" else ("--model", str(model))
            all_flags = ("--port", str(port), *own, *limits, *(() if name == "tokenizer" else leases), *flags)
            if cable is not None and (name, number) == (shape.on_cable, 0):
                there = ("--host", cable.inside, "--metrics-host", cable.inside)
                return Member(
                    f"{name} {number}",
                    lambda wait: spawn(name, *all_flags, *there, wait=wait, prefix=cable.prefix),
                    wire=None,
                )
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
            member("scheduler", number, "--executors", executors, "--redis-url", redis_url, *waits)
            for number in range(shape.schedulers)
        ]
        schedulers = ",".join(_address(member) for member in self.schedulers)
        edge_flags = ("--workers", str(shape.workers), "--max-worker-restarts", "100")
        self.tokenizers = [
            member("tokenizer", number, "--scheduler", schedulers, "--redis-url", redis_url, *edge_flags, wired=False)
            for number in range(shape.tokenizers)
        ]

    @property
    def addresses(self) -> list[str]:
        """Address for clients."""
        return [member.address for member in self.tokenizers]

    @property
    def members(self) -> list[Member]:
        """All services."""
        return [*self.executors, *self.schedulers, *self.tokenizers]

    async def rest(self, before: Mapping[str, Vitals] | None = None) -> dict[str, Vitals]:
        """Wait until nothing runs and everything is as it was. Raises AssertionError with what is not."""
        return await rest(
            self.executors, self.schedulers, self.tokenizers, self.redis, before or {}, MEMORY_MARGINS[self.engine]
        )

    async def wait_linked(self) -> None:
        """Wait until every worker is linked to every scheduler, and every scheduler to every executor."""
        workers = self.shape.tokenizers * self.shape.workers
        wanted = {"tokenizer": workers, "executor": self.shape.executors}
        deadline = time.monotonic() + PATIENCE_LIMIT
        for member in self.schedulers:
            while True:
                found = await asyncio.to_thread(_links, member.process)
                if found == wanted:
                    break
                assert time.monotonic() < deadline, f"{member.name} has links {found}, not {wanted}"
                await asyncio.sleep(0.1)


@contextmanager
def fault_line(shape: Shape, folder: Path, model: Path, engine: str = "fake") -> Iterator[FaultLine]:
    """Start a line of this shape; it ends with the context."""
    with ExitStack() as stack:
        redis = FaultRedis(folder)
        stack.callback(redis.stop)
        cable = stack.enter_context(Namespace()) if shape.on_cable else None
        wires = stack.enter_context(Wires(cable.outside) if cable is not None else Wires())
        spawn = stack.enter_context(contextmanager(spawner)(folder))
        yield FaultLine(shape, spawn, redis, model, wires, engine, cable)


def _links(scheduler: ServiceProcess) -> dict[str, float]:
    try:
        samples = scrape(scheduler)
    except OSError:
        return {}
    return {peer: samples[f'scalellm_scheduler_links{{peer="{peer}"}}'] for peer in ("tokenizer", "executor")}


def _address(member: Member) -> str:
    """Address at which other services reach a member; it stays the same when its process is replaced."""
    return member.wire.address if member.wire is not None else member.address


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
