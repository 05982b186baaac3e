"""The beat of a client link: empty frames while requests run, silence otherwise, an end with the link."""

import asyncio

import pytest

from scalellm.v1 import link_pb2
from service_processes import PATIENCE
from services.scheduler.books import Books
from services.scheduler.client_link import ClientLink
from services.scheduler.request import Request

BEAT = 0.005


async def test_beats_only_while_requests_run(monkeypatch: pytest.MonkeyPatch) -> None:
    frames: list[bytes] = []
    link = ClientLink("test", Books(), beat=BEAT)
    monkeypatch.setattr(link.server_link, "send", frames.append)
    await asyncio.sleep(4 * BEAT)
    assert frames == []
    link.requests[1] = Request(link, link_pb2.Submit(handle=1, token_ids=[1]), 0, 0.0)
    async with asyncio.timeout(PATIENCE):
        while len(frames) < 3:
            await asyncio.sleep(BEAT)
    assert all(link_pb2.ServerFrame.FromString(frame).HasField("step") for frame in frames)
    link.close()
    await asyncio.sleep(2 * BEAT)
    count = len(frames)
    await asyncio.sleep(4 * BEAT)
    assert len(frames) == count
