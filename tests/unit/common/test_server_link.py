"""The downstream end of a link while its reader is slow."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import grpc
import pytest

from scalellm.services.common.errors import StatusError
from scalellm.services.common.lifecycle import MAX_FRAME_BYTES
from scalellm.services.common.link import ServerLink, server
from scalellm.services.common.silence import until_silent
from scalellm.v1 import link_pb2
from service_processes import PATIENCE


class SlowReader:
    """Takes the first message and no other until it is told to go on."""

    def __init__(self) -> None:
        self.messages: list[bytes] = []
        self.goes_on = asyncio.Event()

    async def write(self, message: bytes) -> None:
        self.messages.append(message)
        if len(self.messages) > 1:
            await self.goes_on.wait()


async def no_frames() -> AsyncIterator[bytes]:
    await asyncio.Event().wait()
    yield b""


async def test_what_waited_for_a_slow_reader_leaves_merged_and_never_too_large_for_grpc() -> None:
    link, reader = ServerLink(), SlowReader()
    serving = asyncio.create_task(link.run(b"welcome", no_frames(), reader, lambda frame: None))
    sent = list(range(300))
    for number in sent:
        step = link_pb2.StepOutput(handles=[number], token_ids=[49151] * 20_000, seq=number)
        link.send(link_pb2.ServerFrame(step=step).SerializeToString())
        await asyncio.sleep(0)
    reader.goes_on.set()
    link.close()
    await asyncio.wait_for(serving, PATIENCE)
    welcome, *messages = reader.messages
    assert welcome.startswith(b"welcome")
    assert len(messages) < len(sent)
    assert max(map(len, messages)) <= MAX_FRAME_BYTES
    steps = [link_pb2.ServerFrame.FromString(message).step for message in messages]
    assert [handle for step in steps for handle in step.handles] == sent
    assert steps[-1].seq == sent[-1]


async def test_frames_that_a_client_sends_to_a_closing_link_do_not_cut_off_its_last_frames() -> None:
    link, reader, transport = ServerLink(), SlowReader(), Transport()
    taken_in: list[bytes] = []
    serving = asyncio.create_task(link.run(b"", transport.read(), reader, taken_in.append))
    link.send(step_frame(1))
    await settle()
    link.send(step_frame(2))  # waits for the slow reader
    link.close()
    transport.frames.put_nowait(link_pb2.ClientFrame(renewal=link_pb2.Renewal()).SerializeToString())
    await settle()
    assert not serving.done()
    reader.goes_on.set()
    await asyncio.wait_for(serving, PATIENCE)
    steps = [link_pb2.ServerFrame.FromString(message).step for message in reader.messages[1:]]
    assert [handle for step in steps for handle in step.handles] == [1, 2]
    assert not taken_in


def step_frame(number: int) -> bytes:
    step = link_pb2.StepOutput(handles=[number], token_ids=[7], seq=number)
    return link_pb2.ServerFrame(step=step).SerializeToString()


def count_frame(number: int) -> bytes:
    return link_pb2.ClientFrame(taken=link_pb2.Taken(frames=number)).SerializeToString()


class Transport:
    """Takes every message at once, however slow the reader is."""

    def __init__(self) -> None:
        self.messages: list[bytes] = []
        self.frames: asyncio.Queue[bytes] = asyncio.Queue()

    async def write(self, message: bytes) -> None:
        self.messages.append(message)

    async def read(self) -> AsyncIterator[bytes]:
        while True:
            yield await self.frames.get()

    @property
    def handles(self) -> list[list[int]]:
        """Handles in each message but the Welcome."""
        return [list(link_pb2.ServerFrame.FromString(message).step.handles) for message in self.messages[1:]]


async def settle() -> None:
    """Let all tasks do what they can."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_reader_that_tells_what_it_took_finds_few_frames_however_much_the_transport_holds() -> None:
    link, transport, others = ServerLink(), Transport(), []
    serving = asyncio.create_task(link.run(b"", transport.read(), transport, others.append))

    async def send(numbers: range) -> None:
        for number in numbers:
            link.send(step_frame(number))
            await settle()

    await send(range(40))
    assert transport.handles == [[number] for number in range(40)], "it has not told anything: it may be an older one"
    transport.frames.put_nowait(count_frame(32))
    await settle()
    await send(range(40, 100))
    assert len(transport.handles) == 32 + 16
    transport.frames.put_nowait(count_frame(40))
    await settle()
    assert transport.handles[48] == list(range(48, 100)), "what waited comes as one"
    assert not others
    await send(range(100, 120))
    link.close()
    await asyncio.wait_for(serving, PATIENCE)
    assert [handle for handles in transport.handles for handle in handles] == list(range(120)), "the end does not wait"


@pytest.mark.parametrize("counts", [(3,), (2, 1)])
async def test_counts_of_what_was_not_written_end_the_link(counts: tuple[int, ...]) -> None:
    link, transport = ServerLink(), Transport()
    serving = asyncio.create_task(link.run(b"", transport.read(), transport, lambda frame: None))
    for number in range(2):
        link.send(step_frame(number))
        await settle()
    for count in counts:
        transport.frames.put_nowait(count_frame(count))
    with pytest.raises(StatusError, match=r"taken.frames: must be in \[[02], 2\], got [13]"):
        await asyncio.wait_for(serving, PATIENCE)


async def test_a_link_whose_client_left_before_its_welcome_is_closed() -> None:
    class Gone:
        async def write(self, message: bytes) -> None:
            raise asyncio.CancelledError

    link = ServerLink()
    with pytest.raises(asyncio.CancelledError):
        await link.run(b"welcome", no_frames(), Gone(), lambda frame: None)
    assert link.is_closed


async def test_a_client_that_reads_nothing_of_what_it_asks_for_loses_its_link(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each Submit that is refused has an answer, however many there are."""
    monkeypatch.setattr(server, "_MOST_PENDING_BYTES", 1000)
    link, reader = ServerLink(), SlowReader()
    serving = asyncio.create_task(link.run(b"", no_frames(), reader, lambda frame: None))
    link.send(step_frame(0))
    await settle()
    for number in range(1000):
        link.send(step_frame(number))
    assert sum(map(len, link._pending)) < 1100
    with pytest.raises(StatusError, match="frames: more than 1000 bytes wait for the client of this link") as ended:
        await asyncio.wait_for(serving, PATIENCE)
    assert ended.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_client_that_reads_may_get_any_number_of_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_MOST_PENDING_BYTES", 1000)
    link, transport = ServerLink(), Transport()
    serving = asyncio.create_task(link.run(b"", transport.read(), transport, lambda frame: None))
    for number in range(200):
        link.send(step_frame(number))
        await settle()
    link.close()
    await asyncio.wait_for(serving, PATIENCE)
    assert [handle for handles in transport.handles for handle in handles] == list(range(200))


async def test_a_client_that_is_not_read_for_want_of_room_is_not_silent() -> None:
    link, transport, room = ServerLink(), Transport(), asyncio.Event()
    taken_in: list[bytes] = []

    async def wait_for_room() -> None:
        await room.wait()

    serving = asyncio.create_task(link.run(b"", transport.read(), transport, taken_in.append, 0.1, wait_for_room))
    frame = link_pb2.ClientFrame(renewal=link_pb2.Renewal()).SerializeToString()
    for _ in range(3):
        transport.frames.put_nowait(frame)
    await asyncio.sleep(0.5)
    assert not serving.done()
    assert len(taken_in) == 1
    room.set()
    with pytest.raises(StatusError, match="has not renewed its lease"):
        await asyncio.wait_for(serving, PATIENCE)
    assert len(taken_in) == 3


class Turns:
    """Sleep that takes no time, and does something in the first so many turns."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, work: Callable[[], None], num_turns: int) -> None:
        self.slept: list[float] = []
        self._work, self._num_turns = work, num_turns
        self._sleep = asyncio.sleep
        monkeypatch.setattr("scalellm.services.common.silence.asyncio.sleep", self.sleep)

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        if len(self.slept) <= self._num_turns:
            self._work()
        await self._sleep(0)


async def test_a_silence_begins_anew_with_each_frame_and_counts_only_while_one_is_due(monkeypatch) -> None:
    heard, due = [0], [False]
    turns = Turns(monkeypatch, lambda: heard.append(0), 7)
    await until_silent(10.0, lambda: len(heard))
    assert len(turns.slept) == 7 + 11
    turns = Turns(monkeypatch, lambda: None, 0)
    waiting = asyncio.create_task(until_silent(10.0, lambda: 0, lambda: due[0]))
    while len(turns.slept) < 100:
        await turns._sleep(0)
    due[0] = True
    await waiting
    assert sum(turns.slept[100:]) <= 12.0


async def test_a_process_that_stood_still_does_not_take_its_client_for_dead(monkeypatch) -> None:
    """An hour passes between two turns: a turn counts for what it was to be, and then the frames are read."""
    heard = [0]
    hours = [0.0]

    def stand_still() -> None:
        hours[0] += 3600.0
        if len(turns.slept) % 8 == 0:
            heard.append(0)

    turns = Turns(monkeypatch, stand_still, 40)
    await until_silent(10.0, lambda: len(heard))
    assert hours[0] == 40 * 3600.0


async def test_the_client_is_told_its_lease_and_a_silent_one_is_let_go() -> None:
    link, reader = ServerLink(), SlowReader()
    welcome = link_pb2.ServerFrame(welcome=link_pb2.Welcome(model="m")).SerializeToString()
    with pytest.raises(StatusError, match="has not renewed its lease for 0.2 s") as ended:
        await asyncio.wait_for(link.run(welcome, no_frames(), reader, lambda frame: None, 0.2), PATIENCE)
    assert ended.value.code is grpc.StatusCode.UNAVAILABLE
    told = link_pb2.ServerFrame.FromString(reader.messages[0]).welcome
    assert (told.model, told.lease_ns) == ("m", 200_000_000)


@pytest.mark.parametrize("ends_by", ["close", "client cancels"])
async def test_the_read_under_way_when_a_link_ends_is_left_to_end_with_the_call(ends_by: str) -> None:
    """gRPC never frees a message that comes for a read that was cancelled: ended links would cost memory for good."""
    call_over, reads = asyncio.Event(), list[str]()
    taken = list[bytes]()

    async def frames() -> AsyncIterator[bytes]:
        try:
            await call_over.wait()
        except asyncio.CancelledError:
            reads.append("cancelled")
            raise
        reads.append("ended")
        yield b"late"

    link, reader = ServerLink(), SlowReader()
    serving = asyncio.create_task(link.run(b"welcome", frames(), reader, taken.append))
    while not reader.messages:
        await asyncio.sleep(0)
    if ends_by == "close":
        link.close()
    else:
        serving.cancel()
    await asyncio.wait((serving,))
    assert reads == []
    call_over.set()
    while not reads:
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert (reads, taken) == (["ended"], [])
