"""The links of clients: their beat, the size of their frames, and the services that GetState tells of."""

import asyncio

import pytest

from scalellm.services.scheduler.books import Books
from scalellm.services.scheduler.client_link import ClientLink
from scalellm.services.scheduler.request import Request
from scalellm.services.scheduler.service import client_states
from scalellm.v1 import common_pb2, link_pb2
from service_processes import PATIENCE

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


async def test_log_probabilities_of_several_executors_do_not_make_a_frame_too_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Results of one turn of the event loop leave together, up to a bound."""
    frames: list[bytes] = []
    link = ClientLink("test", Books())
    monkeypatch.setattr(link.server_link, "send", frames.append)
    values = common_pb2.TokenLogprobs(
        logprobs=[-1.0] * 3000, num_top=20, top_token_ids=[2**20 - 1] * 60_000, top_logprobs=[-2.0] * 60_000
    )
    parts = [link_pb2.LinkLogprobs(handle=handle, values=values) for handle in range(40)]
    for part in parts:  # 40 times half a megabyte
        link.add_prompt_logprobs(part)
        link.flush_if_full()
    link.flush()
    assert max(map(len, frames)) < 4 * 2**20
    assert list(link_pb2.ServerFrame.FromString(b"".join(frames)).step.prompt_logprobs) == parts
    link.close()


async def test_services_are_told_with_their_workers_and_requests() -> None:
    links = [
        ClientLink(worker, Books(), service=service)
        for worker, service in (("one", "b:1"), ("one", "b:1"), ("two", "b:1"), ("three", "a:1"), ("old", ""))
    ]
    for link, count in zip(links, (1, 2, 0, 4, 0), strict=True):
        link.requests = {handle: Request(link, link_pb2.Submit(token_ids=[1]), 0, 0.0) for handle in range(count)}
    told = [(state.service, state.workers, state.running) for state in client_states(links)]
    assert told == [("", 1, 0), ("a:1", 1, 4), ("b:1", 2, 3)]
