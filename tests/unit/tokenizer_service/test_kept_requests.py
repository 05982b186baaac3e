"""The kept requests of one worker, with a journal that answers when a test wants it to."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from unittest.mock import AsyncMock, MagicMock

import grpc
import pytest

from scalellm.services.common.api_keys import Tenant
from scalellm.services.common.errors import StatusError
from scalellm.services.tokenizer.kept import kept_request, kept_requests
from scalellm.services.tokenizer.kept.journal import Entry, Head, Reading, Written, digest
from scalellm.services.tokenizer.kept.kept_request import KeptRequest
from scalellm.services.tokenizer.kept.kept_requests import KeptRequests
from scalellm.services.tokenizer.kept.transcript import Transcript
from scalellm.services.tokenizer.kept.written_part import WrittenPart
from scalellm.services.tokenizer.rpc import CallGate
from scalellm.services.tokenizer.token_receiver import TokenBatch
from scalellm.v1 import common_pb2, generation_pb2, link_pb2
from service_processes import PATIENCE, eventually

TENANT = Tenant("acme")
REQUEST = generation_pb2.GenerateRequest(prompt="x", request_id="r")


class FakeJournal:
    """The journal of one request that runs elsewhere."""

    def __init__(self) -> None:
        sampling = common_pb2.SamplingParams(n=1, seed=1, max_tokens=100)
        submit = link_pb2.Submit(request_id="r", token_ids=[1, 2], sampling=sampling, execution_id=b"e")
        self.request_head: Head | None = Head(digest(REQUEST), REQUEST, submit, generation_pb2.Started(request_id="r"))
        self.lease_left = 1000
        self.answers = asyncio.Event()
        self.answers.set()
        self.pieces: list[asyncio.Future[Reading | None]] = []
        self.written: list[Sequence[Entry]] = []

    async def head(self, tenant: Tenant, request_id: str) -> Head | None:
        return self.request_head

    async def read(self, tenant: Tenant, request_id: str, num_bytes: int = 0, edition: str = "") -> Reading | None:
        if self.pieces:
            return await self.pieces.pop(0)
        return Reading(b"e", 1, self.lease_left, None, None, False, "1", link_pb2.StepOutput(), 0)

    async def take(self, tenant: Tenant, request_id: str, execution: bytes, fence: int) -> int:
        return fence + 1

    async def write(self, entries: Sequence[Entry]) -> list[tuple[Written, int]]:
        await self.answers.wait()
        self.written.append(entries)
        return [(Written.DONE, 0) for _ in entries]


class Line:
    """The kept requests of a worker, and all around them."""

    def __init__(self) -> None:
        self.journal, self.gate = FakeJournal(), CallGate()
        self.kept = KeptRequests(self.journal, self.gate, 3.0)  # type: ignore[arg-type]
        self.edge = MagicMock(quotas=SimpleNamespace(admit=AsyncMock(return_value=None)))
        self.edge.models.serving.return_value = self.edge

    async def find(self) -> KeptRequest:
        return await self.kept.find(self.edge.models, TENANT, "r")


async def test_a_cancel_during_a_takeover_is_not_lost() -> None:
    line = Line()
    line.journal.lease_left = 0
    taken, admitted = asyncio.Event(), asyncio.Event()

    async def admit(tenant: Tenant, priority: int) -> None:
        taken.set()
        await admitted.wait()

    line.edge.quotas.admit = admit
    kept = await line.find()
    with kept.followed():
        await asyncio.wait_for(taken.wait(), PATIENCE)
        cancelling = asyncio.create_task(kept.cancel())
        await asyncio.sleep(0)
        admitted.set()
        await asyncio.wait_for(cancelling, PATIENCE)
    assert kept.transcript.error is not None
    assert kept.transcript.error.code == grpc.StatusCode.CANCELLED.value[0]
    assert not line.edge.schedulers.submit.called
    await line.kept.stop()


async def test_who_comes_after_the_last_reader_does_not_get_a_follower_that_ends() -> None:
    line = Line()
    first = await line.find()
    async with line.kept._writing:  # Redis is slow
        with first.followed():
            await asyncio.wait_for(first.look(), PATIENCE)
        second = await line.find()
        assert second is not first
        with second.followed():
            await asyncio.wait_for(second.look(), PATIENCE)
            await eventually(lambda: line.kept._all == {second})
            assert first.transcript.is_over
            assert not second.transcript.is_over
            assert await line.find() is second
    await line.kept.stop()


async def test_who_comes_after_a_follower_had_no_reader_gets_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_request, "_POLL", 0.0)
    line = Line()
    first = await line.find()
    async with line.kept._writing:
        while not first.transcript.is_over:
            await asyncio.sleep(0)
        second = await line.find()
        assert second is not first
        assert not second.transcript.is_over
    await line.kept.stop()


async def test_a_silent_redis_does_not_hold_up_a_worker_that_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_requests, "_LAST_WRITES", 0.0)
    line = Line()
    line.journal.lease_left = 0

    async def admit(tenant: Tenant, priority: int) -> None:  # it is here, and does not run yet
        await asyncio.Event().wait()

    line.edge.quotas.admit = admit
    kept = await line.find()
    with kept.followed():
        await eventually(lambda: kept.is_here)
        line.journal.answers.clear()
        await asyncio.wait_for(line.kept.stop(), PATIENCE)
        await eventually(lambda: kept.transcript.is_over)
    assert kept.transcript.error is not None
    assert kept.transcript.error.message == "the server is shutting down; resume the request"
    line.journal.answers.set()
    await eventually(lambda: not line.kept._all)


async def test_the_same_request_does_not_run_again_in_a_worker_that_drains() -> None:
    line = Line()
    await line.gate.drain(0.0)
    with pytest.raises(StatusError, match="the service is shutting down") as error:
        await line.kept.find_same(line.edge, TENANT, REQUEST)
    assert error.value.code is grpc.StatusCode.UNAVAILABLE


async def test_a_request_that_nobody_knows_is_new_and_so_is_any_while_redis_is_away() -> None:
    line = Line()
    line.journal.request_head = None
    assert await line.kept.find_same(line.edge, TENANT, REQUEST) is None
    line.journal.head = AsyncMock(side_effect=StatusError.unavailable("Redis is away"))  # type: ignore[method-assign]
    assert await line.kept.find_same(line.edge, TENANT, REQUEST) is None


def tokens_from(offset: int, count: int) -> link_pb2.StepOutput:
    numbers = range(offset, offset + count)
    return link_pb2.StepOutput(handles=[0], indices=[0], offsets=[offset], counts=[count], token_ids=numbers)


async def test_readers_of_a_long_journal_get_each_piece_when_it_was_read() -> None:
    line = Line()
    pieces = line.journal.pieces = [asyncio.get_running_loop().create_future() for _ in range(3)]
    first, second, last = pieces
    kept = await line.find()
    with kept.followed(), kept.transcript.reader([0], 1) as reader:
        looking = asyncio.create_task(kept.look())
        first.set_result(Reading(b"e", 1, 0, None, None, False, "1", tokens_from(0, 5), 50, is_whole=False))
        await asyncio.wait_for(reader.wait(), PATIENCE)
        await eventually(lambda: kept.transcript.num_tokens == 5)
        end = generation_pb2.Finished()
        second.set_result(Reading(b"e", 1, 0, None, end, False, "1", tokens_from(5, 5), 99, is_whole=False))
        await eventually(lambda: kept.transcript.num_tokens == 10)
        assert not looking.done(), "there is more"
        assert not kept.transcript.is_over
        assert not kept.is_here, "the worker's lease is over, but the request has ended"
        rest = tokens_from(10, 1)
        rest.finished_samples.add(index=0, reason=common_pb2.FINISH_REASON_LENGTH)
        last.set_result(Reading(b"e", 1, 0, None, end, False, "1", rest, 120))
        await asyncio.wait_for(looking, PATIENCE)
        assert kept.transcript.finished == end
        assert kept.transcript.num_tokens == 11
    await line.kept.stop()


@pytest.mark.parametrize("loss", ["", "created again", "gone"])
async def test_a_worker_that_takes_over_reads_all_pieces_and_what_the_journal_lost_is_written_again(loss: str) -> None:
    line = Line()
    head = line.journal.request_head
    assert head is not None
    transcript = Transcript(head.submit)
    part = WrittenPart(TENANT, head, transcript)
    line.journal.pieces = pieces = [asyncio.get_running_loop().create_future() for _ in range(3)]
    pieces[0].set_result(Reading(b"e", 2, 0, None, None, False, "1", tokens_from(0, 5), 50, is_whole=False))
    if loss == "gone":
        pieces[1].set_result(None)
    elif loss:
        pieces[1].set_result(Reading(b"e", 2, 0, None, None, False, "2", tokens_from(0, 2), 20, is_whole=False))
        pieces[2].set_result(Reading(b"e", 2, 0, None, None, False, "2", tokens_from(2, 1), 30))
    else:
        pieces[1].set_result(Reading(b"e", 2, 0, None, None, False, "1", tokens_from(5, 4), 90, is_whole=False))
        pieces[2].set_result(Reading(b"e", 2, 0, None, None, False, "1", tokens_from(9, 1), 100))
    await part.read_all(line.journal)  # type: ignore[arg-type]
    assert transcript.num_tokens == (5 if loss else 10)
    entry = part.next_entry(2, None)
    written = link_pb2.StepOutput.FromString(entry.step)
    known = {"": (10, 100), "created again": (3, 30), "gone": (0, 0)}[loss]
    assert entry.num_bytes == known[1]
    assert list(written.token_ids) == list(range(known[0], transcript.num_tokens))


async def test_what_came_while_redis_was_away_is_written_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_requests, "_WRITE_BYTES", 20_000)
    line = Line()
    head = line.journal.request_head
    assert head is not None
    end = generation_pb2.Finished()
    finish = link_pb2.LinkSampleFinish(index=0, reason=common_pb2.FINISH_REASON_LENGTH)
    all_kept = []
    for _ in range(5):
        kept = KeptRequest(line.edge, line.journal, line.kept._writing, TENANT, head, fence=1)  # type: ignore[arg-type]
        kept.transcript.add(TokenBatch(0, [70_000] * 30_000, None, finish))
        kept.transcript.end(end)
        all_kept.append(kept)
    line.kept._all.update(all_kept)
    for _ in range(20):
        assert await line.kept._write()
    assert all(kept._end_is_written for kept in all_kept)
    sizes = [sum(len(entry.step) for entry in entries) for entries in line.journal.written]
    assert sum(sizes) > 5 * 30_000 * 3
    assert max(sizes) < 20_000 + 3 * 4096 + 100
    by_end = [entry for entries in line.journal.written for entry in entries if entry.end is not None]
    assert len(by_end) == 5
    assert all(link_pb2.StepOutput.FromString(entry.step).finished_samples for entry in by_end), "the end comes last"


async def test_a_worker_that_stops_writes_all_that_a_journal_lacks_and_then_gives_it_up() -> None:
    line = Line()
    head = line.journal.request_head
    assert head is not None
    transcript = Transcript(head.submit)
    transcript.add(TokenBatch(0, list(range(10_000))))
    await WrittenPart(TENANT, head, transcript).write_rest(line.journal, 1, None)  # type: ignore[arg-type]
    entries = [entry for written in line.journal.written for entry in written]
    assert [entry.gives_up for entry in entries] == [False, False, True]
    steps = [link_pb2.StepOutput.FromString(entry.step) for entry in entries]
    assert [token for step in steps for token in step.token_ids] == list(range(10_000))
