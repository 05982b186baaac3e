"""The downstream end of a link while its reader is slow."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from scalellm.v1 import link_pb2
from service_processes import PATIENCE
from services.common.lifecycle import MAX_FRAME_BYTES
from services.common.link import ServerLink


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
    assert welcome == b"welcome"
    assert len(messages) < len(sent)
    assert max(map(len, messages)) <= MAX_FRAME_BYTES
    steps = [link_pb2.ServerFrame.FromString(message).step for message in messages]
    assert [handle for step in steps for handle in step.handles] == sent
    assert steps[-1].seq == sent[-1]


async def test_a_link_whose_client_left_before_its_welcome_is_closed() -> None:
    class Gone:
        async def write(self, message: bytes) -> None:
            raise asyncio.CancelledError

    link = ServerLink()
    with pytest.raises(asyncio.CancelledError):
        await link.run(b"welcome", no_frames(), Gone(), lambda frame: None)
    assert link.is_closed
