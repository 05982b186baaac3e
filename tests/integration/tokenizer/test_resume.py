"""Requests that outlive their calls: resumed, sent twice, and taken over from workers that are gone."""

from __future__ import annotations

import asyncio
from contextlib import closing

import grpc
import pytest
import redis as redis_client

from kept_client import Client, ids, request, serving
from line import scrape
from scalellm.v1 import generation_pb2, link_pb2
from scripted_scheduler import Script, default_tokens
from service_processes import PATIENCE, eventually


async def undisturbed(client, message) -> Client:
    twin = generation_pb2.GenerateRequest()
    twin.CopyFrom(message)
    twin.request_id, twin.on_disconnect = "", generation_pb2.ON_DISCONNECT_CANCEL
    twin.ClearField("request_id")
    reference = Client(twin)
    await reference.begin(client)
    assert not reference.started.resumable
    return reference


async def shaped(client, shape: str, max_tokens: int) -> generation_pb2.GenerateRequest:
    """A request of a shape. Its stop text comes late in the first sample."""
    fields = dict(SHAPES[shape])
    if "stop" in fields:
        whole = (await undisturbed(client, request(max_tokens, n=fields.get("n", 1)))).texts[0]
        fields["stop"] = [whole[len(whole) * 3 // 4 :][:5]]
    return request(max_tokens, **fields)


def copied(message: generation_pb2.GenerateRequest) -> generation_pb2.GenerateRequest:
    """Return the same request under another id."""
    copy = generation_pb2.GenerateRequest()
    copy.CopyFrom(message)
    copy.request_id = next(ids)
    return copy


SHAPES = {
    "one sample": {},
    "many samples": {"n": 3},
    "log-probabilities": {"n": 2, "logprobs": 2, "prompt_logprobs": 1},
    "stop text": {"stop": True, "n": 3},
    "stop text that stays": {"stop": True, "include_stop": True},
    "few messages": {"stream_interval": 7},
}


@pytest.mark.parametrize("shape", SHAPES)
async def test_a_client_that_left_goes_on(client, scheduler, store, shape):
    scheduler.play = lambda submit: Script(delay=0.002)
    message = await shaped(client, shape, 40)
    reference = await undisturbed(client, message)
    scheduler.submits.clear()
    for limit in (0, 1, 5, 1000):
        mine = Client(copied(message))
        await mine.begin(client, limit=limit)
        while mine.finished is None:
            await mine.resume(client, limit=sum(mine.offsets) + 13)
        assert mine.started.resumable
        mine.check(reference)
    assert len(scheduler.submits) == 4, "nothing ran twice"


async def test_what_is_kept_goes_on_without_a_client_and_is_read_later(client, scheduler, service):
    scheduler.play = lambda submit: Script(delay=0.002)
    message = request(30)
    mine = Client(message)
    await mine.begin(client, limit=1)
    await eventually(lambda: scheduler.num_running == 0)
    await mine.resume(client)
    assert mine.tokens[0] == default_tokens(scheduler.submits[0], 0)
    again = Client(message)
    await again.begin(client)  # the same id: the same answer from its beginning
    again.check(mine)
    assert len(scheduler.submits) == 1
    assert scheduler.aborts == []


async def test_the_same_id_at_the_same_time_runs_once(client, scheduler):
    scheduler.play = lambda submit: Script(delay=0.01, start_at_resumed=True)
    clients = [Client(request(20, request_id="twins")) for _ in range(8)]
    await asyncio.gather(*(mine.begin(client) for mine in clients))
    assert len(scheduler.submits) == 1
    for mine in clients:
        mine.check(clients[0])


async def test_another_request_under_a_used_id_is_refused(client, scheduler):
    mine = Client(request(5))
    await mine.begin(client)
    other = request(6, request_id=mine.request.request_id)
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await client.generate(other)
    assert error.value.code() is grpc.StatusCode.ALREADY_EXISTS
    assert error.value.details().startswith("request_id: ")
    # Without the wish to be kept an id means nothing.
    other.on_disconnect = generation_pb2.ON_DISCONNECT_CANCEL
    await client.generate(other)


async def test_what_is_not_kept_cannot_be_resumed(client, scheduler, error_details):
    message = request(5, on_disconnect=generation_pb2.ON_DISCONNECT_CANCEL)
    await client.generate(message)
    for request_id, offsets, code in (
        (message.request_id, [], grpc.StatusCode.NOT_FOUND),
        ("no such", [], grpc.StatusCode.INVALID_ARGUMENT),
        ("x", [0] * 17, grpc.StatusCode.INVALID_ARGUMENT),
    ):
        call = client.generation.Resume(
            generation_pb2.ResumeRequest(request_id=request_id, offsets=offsets), timeout=PATIENCE
        )
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await call.read()
        assert error.value.code() is code


async def test_offsets_beyond_the_answer(client, scheduler):
    mine = Client(request(5))
    await mine.begin(client)
    for offsets, field in (([6], "offsets[0]: must be at most 5"), ([0, 0], "offsets: must have at most 1")):
        message = generation_pb2.ResumeRequest(request_id=mine.request.request_id, offsets=offsets)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            async for _ in client.generation.Resume(message, timeout=PATIENCE):
                pass
        assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert error.value.details().startswith(field)


async def test_a_refused_request_leaves_its_id_free(client, scheduler, store):
    status = link_pb2.LinkStatus(code=8, message="the queue is full", retry_after_ns=10**9)
    scheduler.play = lambda submit: Script(refuse=status)
    message = request(5)
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await client.generate(message)
    assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    scheduler.play = lambda submit: Script()
    mine = Client(message)
    await mine.begin(client)
    assert mine.finished is not None


async def test_a_failure_is_kept_as_well(client, scheduler):
    status = link_pb2.LinkStatus(code=13, message="numbers are not finite")
    scheduler.play = lambda submit: Script(delay=0.2, fail_after=2, status=status)
    mine = Client(request(5))
    for attempt in (mine.begin, mine.resume):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await attempt(client)
        assert (error.value.code(), error.value.details()) == (grpc.StatusCode.INTERNAL, status.message)
    assert mine.offsets == [2]
    assert len(scheduler.submits) == 1


async def test_a_turn_is_stored_once(client, scheduler):
    scheduler.play = lambda submit: Script(delay=0.005, start_at_resumed=True)
    chat = generation_pb2.Chat(messages=[generation_pb2.ChatMessage(role="user", content="Hi")])
    mine = Client(request(20, chat=chat, session_id="resumed-session"))
    await mine.begin(client, limit=3)
    await mine.resume(client)
    assert mine.finished.session == generation_pb2.SESSION_OUTCOME_SAVED
    again = Client(mine.request)
    await again.begin(client)
    again.check(mine)
    assert again.started.session_turns == 0
    next_turn = Client(request(5, chat=chat, session_id="resumed-session"))
    await next_turn.begin(client)
    assert next_turn.started.session_turns == 1


# Workers, services and Redis that go away: services of the test's own.


def held_once(submit: link_pb2.Submit) -> Script:
    """The first attempt stands still after twenty tokens of each sample; a later one goes on to the end."""
    return Script(start_at_resumed=True, hold_after=20 if submit.attempt == 0 else None)


def num_redis_failures(service) -> float:
    return scrape(service)["scalellm_tokenizer_redis_failures_total"]


async def test_another_service_goes_on_after_a_kill(client, scheduler, start, connect, open_keys):
    messages = [await shaped(client, shape, 60) for shape in SHAPES]
    references = [await undisturbed(client, message) for message in messages]
    first, second = start(), start()
    one, two = await serving(connect, first), await serving(connect, second)
    chat = generation_pb2.Chat(messages=[generation_pb2.ChatMessage(role="user", content="Hi")])
    await Client(request(5, chat=chat, session_id="moved")).begin(one)
    scheduler.submits.clear()
    scheduler.play = held_once
    readers = [Client(message) for message in messages]
    left = [Client(copied(message)) for message in messages]
    turn = Client(request(60, chat=chat, session_id="moved"))
    await asyncio.gather(*(reader.begin(one, limit=1) for reader in left))
    reading = [asyncio.create_task(reader.begin(one)) for reader in (*readers, turn)]
    await eventually(lambda: all(sum(reader.offsets) > 5 for reader in (*readers, turn)))
    first.kill_tree()
    errors = await asyncio.gather(*reading, return_exceptions=True)
    assert [error.code() for error in errors] == [grpc.StatusCode.UNAVAILABLE] * len(errors)

    copies = [Client(message) for message in messages]
    resumed = (*readers, *left, turn)
    await asyncio.gather(*(reader.resume(two) for reader in resumed), *(copy.begin(two) for copy in copies))
    for number, reference in enumerate(references):
        for answer in (readers[number], left[number], copies[number]):
            answer.check(reference)
    runs = [submit for submit in scheduler.submits if submit.request_id == turn.request.request_id]
    assert turn.tokens[0] == default_tokens(runs[-1], 0)
    assert [submit.attempt for submit in runs] == [0, 2**16]
    assert len({submit.execution_id for submit in runs}) == 1
    assert turn.finished.session == generation_pb2.SESSION_OUTCOME_SAVED
    following = Client(request(5, chat=chat, session_id="moved"))
    await following.begin(two)
    assert following.started.session_turns == 2
    assert following.started.prompt_tokens > turn.started.prompt_tokens + len(turn.tokens[0])
    assert open_keys() == []
    for other in (one, two):
        await other.channel.close()


async def test_others_go_on_when_a_worker_is_killed_and_when_a_service_drains(client, scheduler, start, connect):
    reference = await undisturbed(client, request(60))
    scheduler.play = held_once
    first, second = start("--drain-limit-s", "0.2"), start()
    one = await serving(connect, first)
    mine = Client(request(60))
    reading = asyncio.create_task(mine.begin(one))
    await eventually(lambda: sum(mine.offsets) > 5)
    (worker,) = [child for child in first.children() if "scalellm.services.tokenizer.worker" in child.cmdline()]
    worker.kill()
    with pytest.raises(grpc.aio.AioRpcError):
        await reading
    again = await serving(connect, first)
    await mine.resume(again)
    mine.check(reference)

    two = await serving(connect, second)
    mine = Client(request(60))
    reading = asyncio.create_task(mine.begin(again))
    await eventually(lambda: sum(mine.offsets) > 5)
    first.terminate()
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await reading
    assert error.value.code() is grpc.StatusCode.UNAVAILABLE
    await mine.resume(two)
    mine.check(reference)
    for other in (one, again, two):
        await other.channel.close()


async def test_a_stream_goes_on_without_redis(client, scheduler, start, connect, redis, open_keys):
    reference = await undisturbed(client, request(60))
    service = start()
    one = await serving(connect, service)

    async def disturb(stop) -> Client:
        go = asyncio.Event()
        scheduler.play = lambda submit: Script(hold_after=20, go=go)
        mine = Client(request(60))
        reading = asyncio.create_task(mine.begin(one))
        await eventually(lambda: sum(mine.offsets) > 5)
        failures = num_redis_failures(service)
        stop()
        await eventually(lambda: num_redis_failures(service) > failures)
        go.set()
        await reading
        mine.check(reference)
        assert mine.started.resumable
        unkept = Client(request(5))
        await unkept.begin(one)
        assert not unkept.started.resumable
        return mine

    mine = await disturb(redis.pause)
    redis.resume()
    late = Client(mine.request)
    await late.begin(one)
    late.check(reference)
    assert open_keys() == []
    await disturb(redis.stop)
    await one.channel.close()


async def test_an_id_that_is_used_again_stands_for_one_answer(client, scheduler, start, connect, redis, open_keys):
    """Redis loses what it has of a request that runs, and the client sends it again, without a seed, elsewhere."""
    first, second = start(), start()
    one, two = await serving(connect, first), await serving(connect, second)
    go = asyncio.Event()
    scheduler.play = lambda submit: Script(hold_after=20, go=go)
    older, newer = (Client(request(60, seed=None, request_id="used-again")) for _ in range(2))
    reading = [asyncio.create_task(older.begin(one))]
    await eventually(lambda: sum(older.offsets) >= 20)  # no token is on its way that would be written after the loss
    first.suspend()  # else it may write the id again before the other one takes it
    with closing(redis_client.Redis.from_url(redis.url)) as own_store:
        own_store.flushall()
    reading.append(asyncio.create_task(newer.begin(two)))
    await eventually(lambda: sum(newer.offsets) > 5)
    first.resume()
    await eventually(lambda: scrape(first)["scalellm_tokenizer_kept_unwritten"] == 1)  # it knows that it lost its id
    go.set()
    await asyncio.gather(*reading)
    assert [submit.attempt for submit in scheduler.submits] == [0, 0]
    for answer, submit in zip((older, newer), scheduler.submits, strict=True):
        assert answer.tokens == [default_tokens(submit, 0)]
    assert older.tokens != newer.tokens
    for other in (one, two):
        late = Client(newer.request)
        await late.begin(other)
        late.check(newer)
        await other.channel.close()
    assert len(scheduler.submits) == 2
    assert open_keys() == []
