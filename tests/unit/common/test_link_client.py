"""The upstream end of a link, without a peer."""

from __future__ import annotations

import asyncio
import gc
import socket
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import grpc
import pytest

from scalellm.services.common.errors import StatusError
from scalellm.services.common.link import API_MINOR, LinkClient
from scalellm.v1 import link_pb2, scheduler_pb2
from service_processes import PATIENCE, eventually

CONNECT = scheduler_pb2.DESCRIPTOR.services_by_name["Scheduler"].methods_by_name["Connect"]


class Handler:
    """Counts how often the link was lost."""

    def __init__(self) -> None:
        self.num_down = 0
        self.errors: list[StatusError] = []
        self.is_up = asyncio.Event()

    def on_up(self, welcome: link_pb2.Welcome) -> None:
        self.is_up.set()

    def on_step(self, step: link_pb2.StepOutput) -> None:
        pass

    def on_down(self, error: StatusError) -> None:
        self.num_down += 1
        self.errors.append(error)


class Call:
    """A call of a peer that gives a lease, if it welcomes the client, and says nothing more, or some steps, until it
    ends the call.
    """

    def __init__(self, is_welcome: bool = True, *, num_steps: int = 0, counts_frames: bool = False) -> None:
        sizes = {"block_size": 16, "num_blocks": 8, "max_num_seqs": 4, "max_model_len": 64, "vocab_size": 10}
        welcome = link_pb2.Welcome(api_minor=API_MINOR, model="m", lease_ns=60 * 10**9, **sizes)
        welcome.counts_frames = counts_frames
        step = link_pb2.ServerFrame(step=link_pb2.StepOutput()).SerializeToString()
        self._answers = [step] * num_steps
        if is_welcome:
            self._answers.append(link_pb2.ServerFrame(welcome=welcome).SerializeToString())
        self.ended = asyncio.Event()
        self.written: list[link_pb2.ClientFrame] = []

    async def write(self, message: bytes) -> None:
        self.written.append(link_pb2.ClientFrame.FromString(message))

    async def read(self) -> object:
        if self._answers:
            return self._answers.pop()
        await self.ended.wait()
        return grpc.aio.EOF

    async def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNAVAILABLE

    async def details(self) -> str:
        return "the peer is leaving"

    async def trailing_metadata(self) -> tuple[()]:
        return ()

    def cancel(self) -> None:
        pass


class Channel:
    def __init__(self, call: Call) -> None:
        self._call = call

    def stream_stream(self, path: str):
        return lambda metadata: self._call


class Dialer:
    """Every connection finds the same call."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self.channels: list[weakref.ref[Channel]] = []

    def metadata(self) -> tuple[()]:
        return ()

    @asynccontextmanager
    async def open_channel(self, address: str) -> AsyncIterator[Channel]:
        channel = Channel(self._call)
        self.channels.append(weakref.ref(channel))
        yield channel


async def end(running: asyncio.Task[None]) -> None:
    running.cancel()
    await asyncio.wait((running,), timeout=PATIENCE)


@pytest.mark.parametrize("num_turns", range(10))
async def test_a_link_ends_although_the_demand_changes_at_that_moment(num_turns: int) -> None:
    """An executor that leaves gives its requests back, which then wait here for credits."""
    handler, call = Handler(), Call()
    client = LinkClient("127.0.0.1:1", CONNECT, link_pb2.Hello(), handler, dialer=Dialer(call))
    running = asyncio.create_task(client.run())
    await handler.is_up.wait()
    for _ in range(10):  # until its tasks wait
        await asyncio.sleep(0)
    call.ended.set()
    for _ in range(num_turns):  # of the event loop
        await asyncio.sleep(0)
    client.announce_demand()
    for _ in range(100):
        await asyncio.sleep(0)
    assert handler.num_down == 1
    await end(running)


@pytest.mark.parametrize("counts_frames", [True, False])
async def test_a_peer_that_counts_frames_is_told_which_were_taken(counts_frames: bool) -> None:
    handler, call = Handler(), Call(num_steps=30, counts_frames=counts_frames)
    client = LinkClient("127.0.0.1:1", CONNECT, link_pb2.Hello(), handler, dialer=Dialer(call))
    running = asyncio.create_task(client.run())
    await handler.is_up.wait()
    for _ in range(100):
        await asyncio.sleep(0)
    told = [frame.taken.frames for frame in call.written if frame.WhichOneof("frame") == "taken"]
    if counts_frames:
        assert 24 <= told[-1] <= 30
        assert told == sorted(told)
    else:
        assert not told
    await end(running)


@pytest.mark.parametrize("is_welcome", [True, False])
async def test_nothing_of_a_lost_connection_waits_for_the_garbage_collector(is_welcome: bool) -> None:
    """Sockets of a connection stay open until it is collected, and a scheduler's collector comes by rarely."""
    handler, call = Handler(), Call(is_welcome)
    dialer = Dialer(call)
    gc.disable()
    try:
        running = asyncio.create_task(
            LinkClient("127.0.0.1:1", CONNECT, link_pb2.Hello(), handler, dialer=dialer).run()
        )
        if is_welcome:
            await handler.is_up.wait()
        call.ended.set()
        await eventually(lambda: handler.num_down == 1)
        assert [channel() for channel in dialer.channels] == [None]
        await end(running)
    finally:
        gc.enable()


async def test_a_cancellation_that_grpc_takes_for_its_own_ends_the_link(monkeypatch) -> None:
    handler = Handler()
    client = LinkClient("127.0.0.1:1", CONNECT, link_pb2.Hello(), handler)
    connecting = asyncio.Event()

    async def connect_once() -> None:
        connecting.set()
        with suppress(asyncio.CancelledError):  # as a call does that is being prepared
            await asyncio.Event().wait()
        raise StatusError.unavailable("the call ended")

    monkeypatch.setattr(client, "_connect_once", connect_once)
    running = asyncio.create_task(client.run())
    await connecting.wait()
    await end(running)
    assert running.cancelled()
    assert handler.num_down == 0


async def test_a_peer_that_ends_the_call_during_a_write_is_asked_again_at_once() -> None:
    """gRPC hides the peer's status then, so that it must not be taken for the word of a peer that is broken."""

    class Ending(Call):
        async def write(self, message: bytes) -> None:
            await super().write(message)
            if len(self.written) > 1:
                self.ended.set()
                nothing = grpc.aio.Metadata()
                raise grpc.aio.AioRpcError(grpc.StatusCode.INTERNAL, nothing, nothing, "Internal error from Core")

        async def code(self) -> grpc.StatusCode:
            return grpc.StatusCode.INTERNAL

    handler, call = Handler(), Ending()
    client = LinkClient("127.0.0.1:1", CONNECT, link_pb2.Hello(), handler, dialer=Dialer(call))
    running = asyncio.create_task(client.run())
    await handler.is_up.wait()
    client.abort(1, link_pb2.ABORT_REASON_CANCELLED)
    await eventually(lambda: handler.errors)
    await end(running)
    assert (handler.errors[0].code, handler.errors[0].retry_after) == (grpc.StatusCode.UNAVAILABLE, 0.0)


async def test_what_waits_for_a_peer_that_does_not_read_is_of_requests_that_run() -> None:
    """Clients come and go while their scheduler hangs: only what is of use is kept for it."""

    class Hanging(Call):
        def __init__(self) -> None:
            super().__init__()
            self.goes_on = asyncio.Event()

        async def write(self, message: bytes) -> None:
            await super().write(message)
            if len(self.written) > 1:
                await self.goes_on.wait()

    handler, call = Handler(), Hanging()
    client = LinkClient("127.0.0.1:1", CONNECT, link_pb2.Hello(), handler, dialer=Dialer(call))
    running = asyncio.create_task(client.run())
    await handler.is_up.wait()
    client.submit(link_pb2.Submit(handle=1))
    await eventually(lambda: len(call.written) == 2)
    for handle in range(2, 1000):
        client.submit(link_pb2.Submit(handle=handle))
        assert client.withdraw(handle)
    client.submit(link_pb2.Submit(handle=1000))
    for _ in range(100):
        client.abort(1, link_pb2.ABORT_REASON_STOP, 0)
        client.abort(1, link_pb2.ABORT_REASON_CANCELLED)
    assert not client.withdraw(1), "it has left"
    assert len(client._outbox) == 3
    call.goes_on.set()
    await eventually(lambda: not client._outbox)
    await end(running)
    frames = [frame for frame in call.written[1:] if frame.WhichOneof("frame") != "renewal"]
    assert [frame.submit.handle for frame in frames if frame.HasField("submit")] == [1, 1000]
    assert [frame.abort.HasField("index") for frame in frames if frame.HasField("abort")] == [True, False]


async def test_a_peer_that_nobody_listens_for_says_no_time_to_retry() -> None:
    """An error without a time to retry: the scheduler waits for such an executor no longer than its grace."""
    handler = Handler()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    running = asyncio.create_task(LinkClient(f"127.0.0.1:{port}", CONNECT, link_pb2.Hello(), handler).run())
    await eventually(lambda: handler.errors)
    await end(running)
    assert (handler.errors[0].code, handler.errors[0].retry_after) == (grpc.StatusCode.UNAVAILABLE, None)
