"""Sessions in a real Redis."""

from __future__ import annotations

import asyncio
import base64
import contextlib

import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st

from scalellm.services.common.api_keys import Tenant
from scalellm.services.common.errors import StatusError
from scalellm.services.common.redis_client import open_redis
from scalellm.services.tokenizer.message import FunctionCall, Message
from scalellm.services.tokenizer.session import Session, Turn, decode_session, encode_session, new_session
from scalellm.services.tokenizer.session_store import SaveOutcome, SessionStore
from scalellm.services.tokenizer.text.conversation import Continuation, Segment
from service_processes import PATIENCE

ids = st.lists(st.integers(0, 2**32 - 1), max_size=5).map(tuple)
texts = st.text(max_size=10)
calls = st.lists(st.builds(FunctionCall, texts, texts, texts), max_size=2).map(tuple)
messages = st.builds(Message, texts, texts, texts, calls, texts)
segments = st.lists(st.builds(Segment, texts, ids), max_size=4).map(tuple)


def with_turn(session: Session, number: int) -> Session:
    kept = session.segments
    continuation = Continuation(kept, Segment(f"<q{number}>", (number, 10 * number)))
    answer = Segment(f"<a{number}>", (number, 20 * number, 2))
    return session.add_turn([Message("user", f"q{number}")], continuation, answer, Message("assistant", f"a{number}"))


@pytest_asyncio.fixture
async def store(redis_process):
    # Patient: here it is not about time, and forty saves at once may take a busy machine more than a second.
    store = SessionStore(open_redis(redis_process.url, timeout=PATIENCE), ttl=100.0, timeout=PATIENCE)
    yield store
    await store.close()


@given(
    session=st.builds(
        Session,
        st.lists(messages, max_size=3).map(tuple),
        segments,
        st.lists(st.builds(Turn, st.integers(0, 9), st.integers(0, 9)), max_size=3).map(tuple),
        st.floats(0, 2e9),
        st.floats(0, 2e9),
    )
)
def test_what_is_stored_is_what_was_said(session):
    version, fields = encode_session(session)
    stored = {name.encode(): value if isinstance(value, bytes) else value.encode() for name, value in fields.items()}
    decoded = decode_session(stored)
    assert decoded.version == version
    assert (decoded.messages, decoded.segments, decoded.turns) == (session.messages, session.segments, session.turns)
    assert (decoded.created, decoded.updated) == (session.created, session.updated)


@pytest.mark.parametrize("damage", [b"token_ids", b"segments", b"version"])
def test_what_is_no_session_is_told(damage):
    _, fields = encode_session(with_turn(new_session(), 1))
    stored = {name.encode(): b"\xff" for name in fields} | {damage: b"["}
    with pytest.raises(ValueError, match="not a session"):
        decode_session(stored)


async def test_turns_are_kept(store):
    assert await store.load("s") is None
    first = with_turn(new_session(), 1)
    assert await store.save("s", first) is SaveOutcome.SAVED
    loaded = await store.load("s")
    assert loaded is not None
    assert loaded.segments == first.segments
    assert await store.save("s", with_turn(loaded, 2)) is SaveOutcome.SAVED
    found = await store.load_with_expiry("s")
    assert found is not None
    session, remaining = found
    assert len(session.turns) == 2
    assert session.num_tokens == 10
    assert 90 < remaining <= 100


async def test_only_one_of_two_turns_is_stored(store):
    await store.save("s", with_turn(new_session(), 1))
    loaded = await store.load("s")
    outcomes = await asyncio.gather(*(store.save("s", with_turn(loaded, number)) for number in (2, 3)))
    assert sorted(outcome.name for outcome in outcomes) == ["CONFLICT", "SAVED"]


async def test_a_deleted_session_stays_deleted(store):
    await store.save("s", with_turn(new_session(), 1))
    old = await store.load("s")
    assert await store.delete("s")
    assert not await store.delete("s")
    assert await store.save("s", with_turn(old, 2)) is SaveOutcome.CONFLICT
    # Also when another session has begun under the same name, with as many turns.
    await store.save("s", with_turn(new_session(), 7))
    assert await store.save("s", with_turn(old, 2)) is SaveOutcome.CONFLICT
    assert (await store.load("s")).messages[0] == Message("user", "q7")


async def test_two_first_turns_conflict(store):
    assert await store.save("s", with_turn(new_session(), 1)) is SaveOutcome.SAVED
    assert await store.save("s", with_turn(new_session(), 2)) is SaveOutcome.CONFLICT


def test_first_turns():
    session = new_session()
    for number in (1, 2, 3):
        session = with_turn(session, number)
    part = session.first_turns(2)
    assert part.messages == session.messages[:4]
    assert part.segments == session.segments[:4]
    assert part.turns == session.turns[:2]
    assert part.version == ""


def test_rewritten_past_costs_only_the_earlier_borders():
    session = with_turn(with_turn(new_session(), 1), 2)
    rewritten = session.add_turn(
        [Message("user", "q3")],
        Continuation(session.segments[:1], Segment("all the rest", (1, 2, 3))),
        Segment("a3", (4,)),
        Message("assistant", "a3"),
    )
    assert [turn.num_segments for turn in rewritten.turns] == [1, 1, 3]
    assert rewritten.first_turns(2).segments == session.segments[:1]
    assert rewritten.first_turns(2).messages == session.messages


@pytest.mark.parametrize("page_size", [1, 7, 100])
async def test_pages_hold_every_session_once(store, redis_process, page_size):
    other = open_redis(redis_process.url, timeout=PATIENCE)
    await asyncio.gather(*(other.set(f"scalellm:affinity:{number}", "x") for number in range(50)))
    saves = (store.save(f"s{number}", with_turn(new_session(), number)) for number in range(40))
    assert set(await asyncio.gather(*saves)) == {SaveOutcome.SAVED}
    seen, token, pages = [], "", 0
    while pages == 0 or token:
        infos, token = await store.list(page_size, token)
        assert len(infos) <= page_size
        assert all((info.num_turns, info.num_tokens) == (1, 5) for info in infos)
        seen += [info.session_id for info in infos]
        pages += 1
    assert sorted(seen) == sorted(f"s{number}" for number in range(40))
    await other.aclose()


def page_token(text):
    return base64.urlsafe_b64encode(text.encode()).decode()


@pytest.mark.parametrize(
    "token",
    [
        *("x", "####", "bnVsbA==", "WzEsIDJd", "Wy0xLCAiYSJd", "é"),
        *map(page_token, ('[true, "a"]', r'[0, "\ud800"]', '[0, "a b"]', f'[{2**53}, "a"]', "[" * 100_000)),
    ],
)
async def test_made_up_page_tokens_are_refused(store, token):
    with pytest.raises(StatusError, match="page_token: must be empty or the next_page_token"):
        await store.list(10, token)


async def test_a_tenants_sessions_are_its_own(store):
    acme, other = store.of(Tenant("acme")), store.of(Tenant("acme.2"))
    await acme.save("s", with_turn(new_session(), 1))
    await acme.save("2:s", with_turn(new_session(), 2))
    for stranger in (store, other):
        assert await stranger.load("s") is None
        assert await stranger.list(10, "") == ([], "")
        assert not await stranger.delete("s")
        assert await stranger.create("s", with_turn(new_session(), 3))
    assert (await acme.load("s")).messages[0] == Message("user", "q1")
    infos, token = await acme.list(1, "")
    assert [info.session_id for info in (await other.list(10, token))[0]] == ["s"]  # its own, whosever the token was
    assert {*(info.session_id for info in infos), (await acme.list(1, token))[0][0].session_id} == {"s", "2:s"}


async def test_what_expired_leaves_the_list(store, redis_process):
    redis = open_redis(redis_process.url, timeout=PATIENCE)
    brief = SessionStore(redis, ttl=0.02, timeout=PATIENCE)
    assert await brief.save("gone", with_turn(new_session(), 1)) is SaveOutcome.SAVED
    await asyncio.sleep(0.05)  # Redis goes by the clock
    assert await store.list(10, "") == ([], "")
    await store.save("s", with_turn(new_session(), 1))
    assert [info.session_id for info in (await store.list(10, ""))[0]] == ["s"]
    assert await redis.zcard("scalellm:sessions:{default}") == 1
    await redis.aclose()


async def test_a_save_whose_answer_was_lost_is_no_conflict(redis_process):
    lose_next = True

    async def relay(reader, writer):
        """Passes commands on; the answer to the first save is lost with its connection."""
        nonlocal lose_next
        upstream_reader, upstream_writer = await asyncio.open_unix_connection(redis_process.url.removeprefix("unix://"))
        while data := await reader.read(2**16):
            upstream_writer.write(data)
            answer = await upstream_reader.read(2**16)
            if b"EVAL" in data and lose_next:
                lose_next = False
                break
            writer.write(answer)
        upstream_writer.close()
        writer.close()

    server = await asyncio.start_server(relay, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    store = SessionStore(open_redis(f"redis://{host}:{port}", timeout=PATIENCE), ttl=100.0, timeout=PATIENCE)
    assert await store.save("s", with_turn(new_session(), 1)) is SaveOutcome.SAVED
    assert not lose_next
    assert await store.save("s", with_turn(new_session(), 2)) is SaveOutcome.CONFLICT
    await store.close()
    server.close()
    await server.wait_closed()


async def test_something_else_under_the_key(store, redis_process):
    other = open_redis(redis_process.url, timeout=PATIENCE)
    await other.hset("scalellm:session:{default}:odd", "version", "1")
    await other.set("scalellm:session:{default}:wrong-type", "1")
    with pytest.raises(StatusError, match="session 'odd' cannot be read; delete it"):
        await store.load("odd")
    with pytest.raises(StatusError, match="the session store refuses a command"):
        await store.load("wrong-type")
    await other.aclose()


async def test_a_stalled_redis_costs_a_bounded_wait(store, redis_process):
    await store.save("s", with_turn(new_session(), 1))
    hasty = SessionStore(open_redis(redis_process.url), ttl=100.0, timeout=0.1)
    redis_process.pause()
    try:
        with pytest.raises(StatusError, match="does not answer within 0.1 s"):
            await hasty.load("s")
        assert await hasty.save("s", new_session()) is SaveOutcome.UNAVAILABLE
    finally:
        redis_process.resume()
    assert (await store.load("s")).num_tokens == 5
    async with asyncio.timeout(PATIENCE):
        while True:
            with contextlib.suppress(StatusError):  # a busy machine may not do it in 0.1 s
                assert (await hasty.load("s")).num_tokens == 5
                break
    await hasty.close()


async def test_no_redis_at_all():
    with pytest.raises(StatusError, match="sessions are off"):
        await SessionStore(None, ttl=1.0).load("s")
    unreachable = SessionStore(open_redis("unix:///nonexistent/socket"), ttl=1.0)
    with pytest.raises(StatusError, match="the session store cannot be reached"):
        await unreachable.load("s")
    assert await unreachable.save("s", new_session()) is SaveOutcome.UNAVAILABLE
    await unreachable.close()
