"""A link whose client sends more than the engine takes in is read no further; other links do not notice."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from unittest.mock import MagicMock

import pytest

from link_frames import HELLO
from scalellm.services.common.errors import StatusError
from scalellm.services.executor import engine_supervisor
from scalellm.services.executor.config import ExecutorSettings
from scalellm.services.executor.engine_supervisor import EngineSupervisor
from scalellm.services.executor.frame_window import WINDOW, TakenFrames, frame_cost
from scalellm.services.executor.front import ExecutorServicer
from scalellm.services.executor.ipc import EngineChannel, FrontChannel, Kind, Message
from scalellm.v1 import link_pb2

SMALL = link_pb2.ClientFrame(abort=link_pb2.Abort(handle=1)).SerializeToString()
LARGE = link_pb2.ClientFrame(submit=link_pb2.Submit(token_ids=[70_000] * 60_000)).SerializeToString()


class Port:
    """An end of a link that keeps nothing."""

    def on_welcome(self, frame: bytes) -> None:
        pass

    def on_frame(self, frame: bytes) -> None:
        pass

    def on_end(self, error: StatusError) -> None:
        pass


class Context:
    """A client that reads everything."""

    async def write(self, message: bytes) -> None:
        pass


class Client:
    """Sends a Hello, then as many frames as are read, until the call ends."""

    def __init__(self, frame: bytes, most: float = float("inf")) -> None:
        self.num_read = 0
        self.is_over = asyncio.Event()
        self.has_ended = False
        self._frame, self._most = frame, most

    async def frames(self) -> AsyncIterator[bytes]:
        yield HELLO.SerializeToString()
        while not self.is_over.is_set():
            await asyncio.sleep(0)
            if self.num_read >= self._most:
                await self.is_over.wait()
                break
            self.num_read += 1
            yield self._frame
        self.has_ended = True


class Front:
    """A front with links, on an engine that the test plays: it answers Hellos, and takes in frames when it is told."""

    def __init__(self, ours: socket.socket, theirs: socket.socket) -> None:
        self.supervisor = EngineSupervisor(ExecutorSettings())
        self.engine = EngineChannel(theirs)
        self.taken: dict[int, TakenFrames] = {}
        self.num_taken: dict[int, int] = {}
        self._ours = ours
        self._calls: list[tuple[Client, asyncio.Task[None]]] = []

    async def open(self, *clients: Client) -> None:
        if self.supervisor._channel is None:
            self.supervisor._channel = FrontChannel(self.supervisor._on_message)
            await self.supervisor._channel.open(self._ours)
            self.supervisor._ready = True
        servicer = ExecutorServicer(self.supervisor, ExecutorSettings())
        for client in clients:
            call = asyncio.create_task(servicer.Execute(client.frames(), Context()))  # type: ignore[arg-type]
            self._calls.append((client, call))
        await self.turns()
        self.take()

    def take(self) -> None:
        """Take in all frames that came, as the engine does between two steps."""
        for message in self.engine.receive(0.0):
            if message.kind is Kind.OPEN:
                self.taken[message.link], self.num_taken[message.link] = TakenFrames(), 0
                self.engine.send(Message(Kind.WELCOME, message.link, b""))
            elif message.kind is Kind.FRAME:
                self.num_taken[message.link] += 1
                if cost := self.taken[message.link].add(message.payload):
                    self.engine.send(Message(Kind.TAKEN, message.link, b"%d" % cost))

    async def turns(self, number: int = 3000) -> None:
        """Let all clients send what they can."""
        for _ in range(number):
            await asyncio.sleep(0)

    async def stop(self) -> None:
        for _, call in self._calls:
            call.cancel()
        await asyncio.gather(*(call for _, call in self._calls), return_exceptions=True)
        for client, _ in self._calls:
            client.is_over.set()
        await self.turns(10)
        assert all(client.has_ended for client, _ in self._calls), "reads end with their calls"
        if self.supervisor._channel is not None:
            self.supervisor._channel.close()


@pytest.fixture
def front_on() -> Iterator[Callable[[], Front]]:
    """Makes a front, within the test's event loop."""
    ours, theirs = socket.socketpair()
    with theirs:
        yield lambda: Front(ours, theirs)


@pytest.mark.parametrize(("frame", "most"), [(SMALL, 256), (LARGE, 6)])
async def test_a_flooding_link_is_read_as_far_as_its_window_and_another_one_all_the_same(
    front_on: Callable[[], Front], frame: bytes, most: int
) -> None:
    front, flood, other = front_on(), Client(frame), Client(SMALL, most=5)
    await front.open(flood, other)
    await front.turns()
    assert most / 2 < flood.num_read <= most
    assert other.num_read == 5
    while front.num_taken[1] < 3 * most:
        front.take()
        await front.turns(100)
        assert flood.num_read - front.num_taken[1] <= most
    assert front.num_taken[2] == 5
    await front.stop()


async def test_a_link_that_waits_for_room_ends_like_any_other(front_on: Callable[[], Front]) -> None:
    front, flood = front_on(), Client(SMALL)
    await front.open(flood)
    await front.turns()
    before = flood.num_read
    front.supervisor._stacks = MagicMock()
    await front.supervisor._end_process(StatusError.unavailable("the engine process died"))
    await front.turns(10)
    ((_, call),) = front._calls
    with pytest.raises(StatusError, match="the engine process died"):
        await call
    assert flood.num_read <= before + 10
    await front.stop()


async def test_clients_that_open_links_and_leave_do_not_fill_the_connection_to_the_engine(
    front_on: Callable[[], Front], monkeypatch: pytest.MonkeyPatch
) -> None:
    front = front_on()
    await front.open()
    supervisor, hello = front.supervisor, HELLO.SerializeToString()
    for _ in range(256):
        supervisor.close_link(await asyncio.wait_for(supervisor.open_link(hello, Port()), 1.0))
    monkeypatch.setattr(engine_supervisor, "_LINK_PATIENCE", 0.01)
    with pytest.raises(StatusError, match="256 other links are being opened") as refused:
        await supervisor.open_link(hello, Port())
    assert refused.value.retry_after is not None
    monkeypatch.setattr(engine_supervisor, "_LINK_PATIENCE", 60.0)
    opening = asyncio.create_task(supervisor.open_link(hello, Port()))
    await front.turns(10)
    assert not opening.done()
    front.take()
    assert await opening == 257
    await front.stop()


def test_the_engine_tells_of_frames_a_few_times_per_window() -> None:
    taken = TakenFrames()
    told = [taken.add(SMALL) for _ in range(1000)]
    assert sum(told) <= 1000 * frame_cost(SMALL) < sum(told) + WINDOW
    assert sum(cost > 0 for cost in told) <= 8
