"""Conversations kept in a real Redis."""

from __future__ import annotations

import asyncio
import time

import grpc
import pytest
from redis.asyncio import Redis

from scalellm.services.tokenizer.message import Message
from scalellm.services.tokenizer.session import new_session
from scalellm.services.tokenizer.session_store import SessionStore
from scalellm.services.tokenizer.text.conversation import Continuation, Segment
from scalellm.v1 import common_pb2, generation_pb2, sessions_pb2
from scripted_scheduler import Script
from service_processes import PATIENCE, eventually

SAVED = generation_pb2.SESSION_OUTCOME_SAVED


@pytest.fixture
def speak(client, scheduler, tokenizer):
    """Let the model answer a turn of a session with a text."""

    async def speak(session_id, question, answer, *, ends=True, **fields):
        tokens = tokenizer.encode(answer).ids
        if ends:
            tokens.append(tokenizer.token_to_id("<|im_end|>"))
        reason = common_pb2.FINISH_REASON_STOP if ends else common_pb2.FINISH_REASON_LENGTH
        scheduler.play = lambda submit: Script(samples=[tokens], reason=reason, stop_token=ends, chunk=3)
        return await client.generate(
            generation_pb2.GenerateRequest(
                chat=generation_pb2.Chat(messages=[generation_pb2.ChatMessage(role="user", content=question)]),
                session_id=session_id,
                sampling=common_pb2.SamplingParams(max_tokens=100),
                **fields,
            )
        )

    return speak


async def get(client, session_id):
    return (await client.sessions.Get(sessions_pb2.GetSessionRequest(session_id=session_id))).session


async def test_second_turn_continues_the_first(client, scheduler, speak, tokenizer):
    # Tokens that encoding the text again would not give: only stored ids keep the executor's prefix.
    odd = [token for char in "strawberry" for token in tokenizer.encode(char).ids]
    assert tokenizer.encode("strawberry").ids != odd
    end = tokenizer.token_to_id("<|im_end|>")
    answer = [*odd, end]
    scheduler.play = lambda submit: Script(samples=[answer], reason=common_pb2.FINISH_REASON_STOP, stop_token=True)
    chat = generation_pb2.Chat(messages=[generation_pb2.ChatMessage(role="user", content="Name a fruit.")])
    first = await client.generate(generation_pb2.GenerateRequest(chat=chat, session_id="two-turns"))
    assert first.started.session_turns == 0
    assert first.finished.session == SAVED
    prompt = list(scheduler.submits[0].token_ids)
    second = await speak("two-turns", "Another one?", "Plum.")
    assert second.started.session_turns == 1
    submit = scheduler.submits[1]
    assert list(submit.token_ids[: len(prompt) + len(answer)]) == prompt + answer
    assert submit.session_id == "default:two-turns"
    assert tokenizer.decode(submit.token_ids, skip_special_tokens=False).endswith(
        "strawberry<|im_end|>\n<|im_start|>user\nAnother one?<|im_end|>\n<|im_start|>assistant\n"
    )
    session = await get(client, "two-turns")
    assert [(message.role, message.content) for message in session.messages] == [
        ("user", "Name a fruit."),
        ("assistant", "strawberry"),
        ("user", "Another one?"),
        ("assistant", "Plum."),
    ]
    assert session.num_turns == 2
    assert session.num_tokens == len(submit.token_ids) + len(tokenizer.encode("Plum.").ids) + 1
    assert session.create_time.ToNanoseconds() <= session.update_time.ToNanoseconds()
    assert 3500 < session.expire_time.ToSeconds() - time.time() <= 3601


async def test_turn_cut_short_is_stored(client, scheduler, speak, tokenizer):
    await speak("cut", "Tell me a story.", "Once upon a", ends=False)
    submit = scheduler.submits[0]
    await speak("cut", "Go on.", "time.")
    stored = [*submit.token_ids, *tokenizer.encode("Once upon a").ids]
    assert list(scheduler.submits[1].token_ids[: len(stored)]) == stored
    assert (await get(client, "cut")).messages[1].content == "Once upon a"


async def test_stop_string_ends_a_stored_turn(client, scheduler, speak):
    answer = await speak("stopped", "Count.", "One two three four", stop=[" three"])
    assert answer.finished.session == SAVED
    assert (await get(client, "stopped")).messages[1].content == "One two"


async def test_cancelled_turn_is_not_stored(client, scheduler, speak):
    await speak("cancelled", "Hi", "Hello!")
    scheduler.play = lambda submit: Script(hold_after=2)
    call = client.generation.Generate(
        generation_pb2.GenerateRequest(
            chat=generation_pb2.Chat(messages=[generation_pb2.ChatMessage(role="user", content="More")]),
            session_id="cancelled",
        )
    )
    await call.read()
    call.cancel()
    await eventually(lambda: len(scheduler.aborts) == 1)
    assert (await get(client, "cancelled")).num_turns == 1


@pytest.mark.parametrize("rival", ["turn", "delete"])
async def test_conflicting_turn_is_not_stored(client, scheduler, speak, rival):
    name = f"conflict-{rival}"
    await speak(name, "Hi", "Hello!")
    rival_is_done = asyncio.Event()
    scheduler.play = lambda submit: Script(go=rival_is_done, samples=[[1001] * 8])
    request = generation_pb2.GenerateRequest(
        chat=generation_pb2.Chat(messages=[generation_pb2.ChatMessage(role="user", content="Slow")]), session_id=name
    )
    slow = asyncio.create_task(client.generate(request))
    await eventually(lambda: len(scheduler.submits) == 2)
    if rival == "turn":
        assert (await speak(name, "Fast", "Done.")).finished.session == SAVED
    else:
        await client.sessions.Delete(sessions_pb2.DeleteSessionRequest(session_id=name))
    rival_is_done.set()
    answer = await slow
    assert answer.finished.session == generation_pb2.SESSION_OUTCOME_CONFLICT
    assert len(answer.text()) > 0
    if rival == "turn":
        assert (await get(client, name)).messages[2].content == "Fast"
    else:
        with pytest.raises(grpc.aio.AioRpcError, match="there is no session"):
            await get(client, name)


async def test_fork_goes_on_separately(client, scheduler, speak):
    for turn in range(3):
        await speak("trunk", f"Question {turn}", f"Answer {turn}")
    fork = sessions_pb2.ForkSessionRequest(session_id="trunk", new_session_id="branch", num_turns=2)
    forked = (await client.sessions.Fork(fork)).session
    assert [message.content for message in forked.messages] == ["Question 0", "Answer 0", "Question 1", "Answer 1"]
    third_prompt = list(scheduler.submits[2].token_ids)
    await speak("branch", "Question 2", "Another answer")
    assert list(scheduler.submits[3].token_ids) == third_prompt
    assert (await get(client, "trunk")).messages[-1].content == "Answer 2"
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await client.sessions.Fork(fork)
    assert error.value.code() is grpc.StatusCode.ALREADY_EXISTS
    with pytest.raises(grpc.aio.AioRpcError, match=r"num_turns: must be in \[1, 3\]"):
        await client.sessions.Fork(
            sessions_pb2.ForkSessionRequest(session_id="trunk", new_session_id="other", num_turns=4)
        )


async def test_list_pages_through_all(client, speak):
    names = {f"page-{number}" for number in range(7)}
    for name in names:
        await speak(name, "Hi", "Hello!")
    seen, token, pages = [], "", 0
    while pages == 0 or token:
        page = await client.sessions.List(sessions_pb2.ListSessionsRequest(page_size=3, page_token=token))
        assert len(page.sessions) <= 3
        assert all(not session.messages for session in page.sessions)
        seen += [session.session_id for session in page.sessions]
        token, pages = page.next_page_token, pages + 1
    assert names <= set(seen)
    assert len(seen) == len(set(seen))


async def store_large(redis_url, session_id):
    """Store four turns of 4.2 MiB, more than one answer may hold. Returns the contents of the messages."""
    contents = [part for number in range(4) for part in (f"{number} " + "word " * 220_000, f"Answer {number}.")]
    session = new_session()
    for number in range(4):
        question, answer = contents[2 * number : 2 * number + 2]
        segment = Segment(answer, (number,))
        session = session.add_turn(
            [Message("user", question)],
            Continuation(session.segments, Segment(question, (1, 2))),
            segment,
            Message("assistant", answer),
        )
    async with Redis.from_url(redis_url) as redis:
        assert await SessionStore(redis, 3600, timeout=PATIENCE).create(session_id, session)
    return contents


async def patiently(method, request):
    """Call again while Redis, on a busy machine, takes longer than a worker waits for it."""
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                return await method(request)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise


async def test_a_session_of_more_than_4_mib_is_read_and_copied(client, session_redis):
    contents = await store_large(session_redis.url, "large")
    with pytest.raises(grpc.aio.AioRpcError, match="a message holds at most") as refused:
        await patiently(client.sessions.Get, sessions_pb2.GetSessionRequest(session_id="large"))
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    for page_size, least in ((1000, 2), (3, 3), (1, 8)):
        request, told, num_pages = sessions_pb2.GetSessionRequest(session_id="large", page_size=page_size), [], 0
        while True:
            page = await patiently(client.sessions.Get, request)
            assert (page.session.num_turns, page.session.session_id) == (4, "large")
            assert 1 <= len(page.session.messages) <= page_size
            told += [message.content for message in page.session.messages]
            num_pages += 1
            if not page.next_page_token:
                break
            request.page_token = page.next_page_token
        assert told == contents
        assert num_pages >= least
    fork = sessions_pb2.ForkSessionRequest(session_id="large", new_session_id="large-2")
    copy = await patiently(client.sessions.Fork, fork)
    assert (copy.session.num_turns, list(copy.session.messages)) == (4, [])
    request = sessions_pb2.GetSessionRequest(session_id="large-2", page_size=1)
    page = await patiently(client.sessions.Get, request)
    assert page.session.messages[0].content == contents[0]
    # A token is of one session: another's, or one of a session that was begun anew, is refused.
    request = sessions_pb2.GetSessionRequest(session_id="large", page_token=page.next_page_token)
    with pytest.raises(grpc.aio.AioRpcError, match="page_token: must be empty or") as refused:
        await patiently(client.sessions.Get, request)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_every_key_expires(session_redis, client, speak):
    await speak("expires", "Hi", "Hello!")
    redis = Redis.from_url(session_redis.url)
    try:
        keys = [key async for key in redis.scan_iter("*")]
        assert b"scalellm:session:{default}:expires" in keys
        assert all([await redis.ttl(key) > 0 for key in keys])
    finally:
        await redis.aclose()


async def test_stalled_redis_hurts_sessions_only(client, scheduler, speak, session_redis):
    scheduler.play = lambda submit: Script()
    plain = generation_pb2.GenerateRequest(prompt="Hi", sampling=common_pb2.SamplingParams(max_tokens=3))
    await speak("stall", "Hi", "Hello!")
    session_redis.pause()
    try:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await speak("stall", "More", "No.")
        assert error.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "the session store does not answer within 1 s" in error.value.details()
        with pytest.raises(grpc.aio.AioRpcError, match="session store"):
            await get(client, "stall")
        scheduler.play = lambda submit: Script()
        await client.generate(plain)
    finally:
        session_redis.resume()
    assert (await speak("stall", "More", "Yes.")).finished.session == SAVED


async def test_dead_redis_hurts_sessions_only(scheduler, start, redis, connect):
    client = connect(start().address)
    await client.wait_serving()
    chat = generation_pb2.Chat(messages=[generation_pb2.ChatMessage(role="user", content="Hi")])
    turn = generation_pb2.GenerateRequest(chat=chat, session_id="dying")
    redis_is_dead = asyncio.Event()
    scheduler.play = lambda submit: Script(samples=[[1001] * 5], go=redis_is_dead)
    running = asyncio.create_task(client.generate(turn))
    await eventually(lambda: len(scheduler.submits) == 1)
    redis.stop()
    redis_is_dead.set()
    answer = await running
    assert answer.finished.session == generation_pb2.SESSION_OUTCOME_UNAVAILABLE
    assert answer.finished.usage.completion_tokens == 5
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await client.generate(turn)
    assert error.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "the session store cannot be reached" in error.value.details()
    answer = await client.generate(generation_pb2.GenerateRequest(chat=chat, sampling={"max_tokens": 3}))
    assert answer.finished.session == generation_pb2.SESSION_OUTCOME_UNSPECIFIED
    await client.channel.close()
