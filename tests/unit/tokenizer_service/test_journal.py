"""Journals in a real Redis: one owner at a time, bounded, and nothing of them stays."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from redis import Redis

from scalellm.services.common.api_keys import Tenant, TenantLimits
from scalellm.services.common.errors import StatusError
from scalellm.services.common.redis_client import open_redis
from scalellm.services.tokenizer.kept.journal import Entry, Head, Journal, Written
from scalellm.services.tokenizer.kept.transcript import Transcript
from scalellm.v1 import common_pb2, generation_pb2, link_pb2
from service_processes import PATIENCE, RedisProcess

TENANT = Tenant("acme", TenantLimits(kept_bytes=20_000))
OTHER = Tenant("other")
END = generation_pb2.Finished(usage=common_pb2.Usage(completion_tokens=3))


@asynccontextmanager
async def journals(redis: RedisProcess, lease: float = 0.2) -> AsyncIterator[Callable[[str], Journal]]:
    client = open_redis(redis.url, timeout=PATIENCE)
    yield lambda owner: Journal(client, owner, ttl=100.0, lease=lease, max_bytes=2**20)
    await client.aclose()
    if redis.process.poll() is None:
        store = Redis.from_url(redis.url)
        assert [key for key in store.keys("*") if store.pttl(key) < 0] == []
        store.close()


def head(request_id: str = "r", execution: bytes = b"e") -> Head:
    sampling = common_pb2.SamplingParams(n=1, seed=1)
    submit = link_pb2.Submit(request_id=request_id, token_ids=[1, 2], sampling=sampling, execution_id=execution)
    request = generation_pb2.GenerateRequest(prompt="x", request_id=request_id)
    return Head(b"digest", request, submit, generation_pb2.Started(request_id=request_id), "version")


def step(offset: int, *tokens: int) -> bytes:
    return link_pb2.StepOutput(
        handles=[0], indices=[0], offsets=[offset], counts=[len(tokens)], token_ids=tokens
    ).SerializeToString()


async def write(journal: Journal, entry: Entry) -> Written:
    ((outcome, _),) = await journal.write([entry])
    return outcome


def entry(fence: int, number: int, num_bytes: int, data: bytes = b"", execution: bytes = b"e", **more: object) -> Entry:
    return Entry(TENANT, "r", execution, fence, number, num_bytes, data, **more)  # type: ignore[arg-type]


async def test_what_one_wrote_another_reads(redis_process):
    async with journals(redis_process) as journal:
        one, two = journal("one"), journal("two")
        assert await one.head(TENANT, "r") is None
        assert await one.create(TENANT, head(), 1, 5.0) is Written.DONE
        assert await one.create(TENANT, head(), 1, 5.0) is Written.DONE, "the same again: its answer was lost"
        assert await two.create(TENANT, head(execution=b"other"), 1, None) is Written.OTHER
        assert await two.create(OTHER, head(execution=b"other"), 1, None) is Written.DONE, "another tenant's id"
        assert await two.head(TENANT, "r") == head()
        first = step(0, 5, 6)
        for _ in range(2):  # the second time as after a connection that broke
            assert await write(one, entry(1, 1, 0, first)) is Written.DONE
        assert await write(one, entry(1, 2, len(first), step(2, 7), end=END)) is Written.DONE
        reading = await two.read(TENANT, "r")
        assert list(reading.steps.token_ids) == [5, 6, 7]
        assert reading.end == END
        assert reading.time_left <= 5.0
        rest = await two.read(TENANT, "r", len(first), reading.edition)
        assert list(rest.steps.token_ids) == [7]
        assert await two.take(TENANT, "r", b"e", 1) == 0, "it has ended"


async def test_a_long_journal_is_read_in_pieces_while_it_grows(redis_process):
    async with journals(redis_process) as journal:
        one, two = journal("one"), journal("two")
        await one.create(OTHER, head(), 1, None)
        num_bytes, offset = 0, 0

        async def append(number: int) -> None:
            nonlocal num_bytes, offset
            data = step(offset, *range(100_000, 107_000))
            ((outcome, num_bytes),) = await one.write([Entry(OTHER, "r", b"e", 1, number, num_bytes, data)])
            assert outcome is Written.DONE
            offset += 7000

        for number in range(1, 21):
            await append(number)
        read, place, edition, is_whole, num_pieces = Transcript(head().submit), 0, "", False, 0
        while not is_whole:
            reading = await two.read(OTHER, "r", place, edition)
            assert reading.num_bytes - place <= 2**16
            read.apply(reading.steps)
            place, edition, is_whole = reading.num_bytes, reading.edition, reading.is_whole
            num_pieces += 1
            if num_pieces == 3:
                await append(21)
        assert (read.num_tokens, place) == (offset, num_bytes) == (21 * 7000, num_bytes)
        assert num_pieces >= num_bytes / 2**16


async def test_a_write_whose_answer_was_lost_loses_nothing(redis_process):
    """A worker is stopped within a write: the next write says more, and knows nothing of the one before."""
    async with journals(redis_process) as journal:
        one, two = journal("one"), journal("two")
        await one.create(TENANT, head(), 1, None)
        first, longer = step(0, 5, 6), step(0, 5, 6, 7)
        await one.write([entry(1, 1, 0, first)])
        edition = (await two.read(TENANT, "r")).edition
        ((outcome, num_bytes),) = await one.write([entry(1, 2, 0, longer)])
        assert outcome is Written.DONE
        middle = await two.read(TENANT, "r", len(first), edition)
        assert middle.num_bytes == num_bytes
        assert await write(one, entry(1, 3, num_bytes, step(3, 8), gives_up=True)) is Written.DONE
        late, early = Transcript(head().submit), Transcript(head().submit)
        late.apply((await two.read(TENANT, "r")).steps)
        early.apply(link_pb2.StepOutput.FromString(first))
        early.apply(middle.steps)
        early.apply((await two.read(TENANT, "r", middle.num_bytes, edition)).steps)
        assert [list(transcript.samples[0].token_ids) for transcript in (late, early)] == [[5, 6, 7, 8]] * 2
        assert await two.take(TENANT, "r", b"e", 1) == 2


async def test_a_write_that_comes_after_a_later_one_adds_nothing(redis_process):
    """As when the connection of the first hangs, and the second goes over another one."""
    async with journals(redis_process) as journal:
        one, two = journal("one"), journal("two")
        await one.create(TENANT, head(), 1, None)
        early, later = entry(1, 1, 0, step(0, 5, 6)), entry(1, 2, 0, step(0, 5, 6, 7, 8))
        (written,) = await one.write([later])
        assert written[0] is Written.DONE
        assert await one.write([early]) == [written]
        # A write of as many bytes as the early one had, which tells a repeated write apart by its number alone.
        assert await write(one, entry(1, 3, written[1], step(4, 9, 10))) is Written.DONE
        assert list((await two.read(TENANT, "r")).steps.token_ids) == [5, 6, 7, 8, 9, 10]


async def test_an_id_that_was_used_again_keeps_one_execution_alone(redis_process):
    """Redis loses the journal, the client sends the request again elsewhere, and the first execution still runs."""
    store = Redis.from_url(redis_process.url)
    async with journals(redis_process) as journal:
        one, two = journal("one"), journal("two")
        await one.create(TENANT, head(), 1, None)
        data = step(0, 5, 6)
        assert await write(one, entry(1, 1, 0, data)) is Written.DONE
        store.flushall()
        again = head(execution=b"again")
        assert await two.create(TENANT, again, 1, None) is Written.DONE
        assert await write(one, entry(1, 2, len(data), step(2, 7))) is Written.OTHER
        assert await one.create(TENANT, head(), 1, None) is Written.OTHER
        await one.forget(TENANT, "r", b"e", 1)
        await asyncio.sleep(0.3)  # the lease ends
        assert await one.take(TENANT, "r", b"e", 1) == 0
        assert await write(two, entry(1, 1, 0, step(0, 8), b"again")) is Written.DONE
        reading = await one.read(TENANT, "r")
        assert (reading.execution, list(reading.steps.token_ids)) == (b"again", [8])
        assert await one.head(TENANT, "r") == again
    store.close()


async def test_a_position_means_nothing_in_a_journal_that_was_created_again(redis_process):
    store = Redis.from_url(redis_process.url)
    async with journals(redis_process) as journal:
        one, two = journal("one"), journal("two")
        await one.create(TENANT, head(), 1, None)
        num_bytes = 0
        for number, token in enumerate((5, 6, 7), start=1):
            ((_, num_bytes),) = await one.write([entry(1, number, num_bytes, step(number - 1, token))])
        before = await two.read(TENANT, "r")
        store.flushall()
        stale = entry(1, 4, num_bytes, step(3, 8))
        assert await write(one, stale) is Written.GONE
        assert await one.create(TENANT, head(), 1, None, num_writes=4) is Written.DONE
        assert await write(one, entry(1, 5, 0, step(0, 5, 6, 7, 8))) is Written.DONE
        assert await write(one, stale) is Written.DONE, "it comes once more, and is passed over"
        after = await two.read(TENANT, "r", before.num_bytes, before.edition)
        assert after.edition != before.edition
        assert list(after.steps.token_ids) == [5, 6, 7, 8]
        assert after.num_bytes == (await two.read(TENANT, "r")).num_bytes
    store.close()


async def test_one_owner_at_a_time(redis_process):
    async with journals(redis_process) as journal:
        one, two, three = journal("one"), journal("two"), journal("three")
        await one.create(TENANT, head(), 1, None)
        while not (fence := await two.take(TENANT, "r", b"e", 1)):  # once the lease is over
            await asyncio.sleep(0.01)
        assert fence == 2
        assert await two.take(TENANT, "r", b"e", 1) == 2, "the same again: its answer was lost"
        assert await three.take(TENANT, "r", b"e", 1) == 0
        assert await write(one, entry(1, 1, 0, step(0, 5))) is Written.TAKEN
        assert (await one.read(TENANT, "r")).steps == link_pb2.StepOutput()
        await one.forget(TENANT, "r", b"e", 1)  # no longer its own
        assert await write(two, entry(2, 1, 0, step(0, 5), gives_up=True)) is Written.DONE
        assert await three.take(TENANT, "r", b"e", 2) == 3


async def test_whoever_has_a_request_is_told_to_cancel_it(redis_process):
    async with journals(redis_process) as journal:
        one, two = journal("one"), journal("two")
        assert not await two.cancel(TENANT, "r"), "there is none"
        await one.create(TENANT, head(), 1, None)
        assert not (await two.read(TENANT, "r")).is_cancelled
        assert not await two.cancel(OTHER, "r"), "it is another tenant's"
        for _ in range(2):
            assert await two.cancel(TENANT, "r")
        assert (await two.read(TENANT, "r")).is_cancelled
        data = step(0, 5)
        assert await write(one, entry(1, 1, 0, data)) is Written.CANCELLED
        assert await write(one, entry(1, 2, len(data), end=END)) is Written.DONE, "it ended first"


async def test_a_renewed_lease_is_respected(redis_process):
    async with journals(redis_process, lease=100.0) as journal:
        one, two = journal("one"), journal("two")
        await one.create(TENANT, head(), 1, None)
        assert await two.take(TENANT, "r", b"e", 1) == 0
        assert await write(one, entry(1, 1, 0)) is Written.DONE
        assert (await two.read(TENANT, "r")).lease_left > 0


async def test_what_redis_lost_is_told(redis_process):
    store = Redis.from_url(redis_process.url)
    async with journals(redis_process) as journal:
        one = journal("one")
        await one.create(TENANT, head(), 1, None)
        data = step(0, 5, 6)
        await one.write([entry(1, 1, 0, data)])
        store.delete("scalellm:request-tail:{acme}:r")  # as when memory is short
        assert await write(one, entry(1, 2, len(data), step(2, 7))) is Written.GONE
        assert await one.read(TENANT, "r") is None
        assert await one.create(TENANT, head(), 1, None, 2) is Written.DONE
        store.script_flush()
        assert await write(one, entry(1, 3, 0, data)) is Written.DONE
    store.close()


async def test_bytes_of_a_tenant_are_bounded(redis_process):
    store = Redis.from_url(redis_process.url)
    async with journals(redis_process) as journal:
        one = journal("one")
        created = 0
        while await one.create(TENANT, head(f"r{created}"), 1, None) is Written.DONE:
            created += 1
        assert 10 < created < 40
        assert await one.create(OTHER, head(), 1, None) is Written.DONE
        used = int(store.hget("scalellm:request-bytes:{acme}", ""))
        assert used <= 20_000
        await one.forget(TENANT, "r0", b"e", 1)
        assert await one.create(TENANT, head(), 1, None) is Written.DONE
        assert await write(one, entry(1, 1, 0, b"\0" * 15_000)) is Written.FULL
        assert await one.read(TENANT, "r") is None, "a journal with a gap is none"
        for number in range(created):
            await one.forget(TENANT, f"r{number}", b"e", 1)
        assert int(store.hget("scalellm:request-bytes:{acme}", "")) == 0
        assert store.zcard("scalellm:requests:{acme}") == 0
    store.close()


async def test_a_redis_that_does_not_answer(redis_process):
    async with journals(redis_process) as journal:
        one = journal("one")
        redis_process.stop()
        for attempt in (one.create(TENANT, head(), 1, None), one.read(TENANT, "r"), one.write([entry(1, 1, 0)])):
            with pytest.raises(StatusError, match="the store of kept requests cannot be reached"):
                await attempt
        assert one.num_failures == 3
