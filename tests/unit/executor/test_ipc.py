"""The messages between front and engine arrive whole, in order, whatever the sockets cut them into."""

from __future__ import annotations

import asyncio
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scalellm.services.executor.ipc import EngineChannel, FrontChannel, Kind, Message
from service_processes import PATIENCE

messages = st.lists(
    st.builds(Message, st.sampled_from(Kind), st.integers(0, 2**32 - 1), st.binary(max_size=300)), max_size=20
)


@given(messages, st.integers(1, 50))
def test_engine_reads_what_the_front_wrote(sent: list[Message], cut: int) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        channel = EngineChannel(theirs)
        data = b"".join(message.encode() for message in sent)
        received: list[Message] = []
        for start in range(0, len(data), cut):
            ours.sendall(data[start : start + cut])
            received += channel.receive(0.0)
        assert received == sent


def test_engine_notices_that_the_front_is_gone() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        ours.close()
        with pytest.raises(EOFError):
            list(EngineChannel(theirs).receive(1.0))


async def test_front_reads_what_the_engine_wrote() -> None:
    ours, theirs = socket.socketpair()
    received: list[Message] = []
    front = FrontChannel(received.append)
    await front.open(ours)
    sent = [Message(Kind.STATS, payload=b"x" * 100_000), Message(Kind.FRAME, 7, b"")]
    await asyncio.to_thread(EngineChannel(theirs).send, *sent)
    theirs.close()
    await asyncio.wait_for(front.wait_ended(), PATIENCE)
    assert received == sent
    front.close()


async def test_what_a_message_makes_the_front_raise_ends_the_connection() -> None:
    ours, theirs = socket.socketpair()

    def refuse(message: Message) -> None:
        raise ValueError(message.payload)

    front = FrontChannel(refuse)
    await front.open(ours)
    with theirs:
        engine = EngineChannel(theirs)
        engine.send(Message(Kind.FATAL, payload=b"no"))
        with pytest.raises(ValueError, match="no"):
            await asyncio.wait_for(front.wait_ended(), PATIENCE)
        with pytest.raises(EOFError):
            list(engine.receive(5.0))


def test_engine_notices_a_front_that_left_without_reading() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        engine = EngineChannel(theirs)
        engine.send(Message(Kind.STATS))
        ours.close()
        with pytest.raises(EOFError):  # the system calls it a reset
            list(engine.receive(1.0))
        with pytest.raises(EOFError):
            engine.send(Message(Kind.STATS))
