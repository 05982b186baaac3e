"""Bytes of a tenant's sessions, in a real Redis of a few megabytes: one tenant fills its share and no other's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from redis import Redis

from scalellm.services.common.api_keys import Tenant, TenantLimits
from scalellm.services.common.errors import StatusError
from scalellm.services.common.redis_client import open_redis
from scalellm.services.tokenizer.message import Message
from scalellm.services.tokenizer.quotas import TenantQuotas
from scalellm.services.tokenizer.session import Session, Turn, new_session
from scalellm.services.tokenizer.session_store import SaveOutcome, SessionStore
from service_processes import PATIENCE, RedisProcess, start_redis

KIB = 2**10
LIMIT = 600 * KIB
GREEDY = Tenant("greedy", TenantLimits(session_bytes=LIMIT))
BRIEF = 3.0
"""Seconds after which sessions expire: more than it takes to create eleven, also on a busy machine."""
OTHER = Tenant("other", TenantLimits(concurrent_requests=8))


@pytest.fixture
def small_redis(tmp_path: Path) -> Iterator[RedisProcess]:
    redis = start_redis(tmp_path, "--maxmemory", "4mb", "--maxmemory-policy", "volatile-ttl")
    yield redis
    redis.stop()
    Path(redis.url.removeprefix("unix://")).unlink(missing_ok=True)


@asynccontextmanager
async def stores(redis: RedisProcess, ttl: float = 100.0) -> AsyncIterator[Callable[[Tenant], SessionStore]]:
    refused: list[str] = []
    store = SessionStore(open_redis(redis.url, timeout=PATIENCE), ttl, PATIENCE, refused=refused.append)
    yield store.of
    await store.close()
    assert set(refused) <= {"session_bytes"}


def session(num_bytes: int) -> Session:
    return replace(new_session(), messages=(Message("user", "x" * num_bytes),), turns=(Turn(1, 0),))


async def fill(store: SessionStore, num_bytes: int = 50 * KIB) -> int:
    """Create sessions until one is refused; returns how many there are."""
    created: list[str] = []

    async def create_on() -> None:
        while await store.create(f"s{len(created)}", session(num_bytes)):
            created.append("another")

    with pytest.raises(StatusError) as refusal:
        await create_on()
    assert refusal.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert refusal.value.message.startswith("session_bytes: the sessions of tenant 'greedy' ")
    assert f"may hold {LIMIT} in all" in refusal.value.message
    return len(created)


async def test_one_tenant_fills_its_share_and_no_others(small_redis: RedisProcess) -> None:
    async with stores(small_redis) as store_of:
        quotas = TenantQuotas(open_redis(small_redis.url, timeout=PATIENCE), "worker")
        lease = await quotas.admit(OTHER)
        assert lease is not None
        others = store_of(OTHER)
        for number in range(20):
            assert await others.create(f"s{number}", session(10 * KIB))
        assert await fill(store_of(GREEDY)) == 11
        assert (await store_of(GREEDY).list(100, ""))[0]
        assert len((await others.list(100, ""))[0]) == 20
        assert all([await others.load(f"s{number}") for number in range(20)])
        with Redis(unix_socket_path=small_redis.url.removeprefix("unix://")) as redis:
            assert redis.exists("scalellm:quota:{other}")
            assert redis.info("stats")["evicted_keys"] == 0
        lease.end(0)
        await quotas.close()


async def test_limits_outlive_sessions_in_a_full_redis(small_redis: RedisProcess) -> None:
    async with stores(small_redis) as store_of:
        quotas = TenantQuotas(open_redis(small_redis.url, timeout=PATIENCE), "worker")
        assert await quotas.admit(OTHER) is not None
        unlimited = store_of(Tenant("unlimited", TenantLimits(session_bytes=2**40)))
        for number in range(150):
            assert await unlimited.create(f"s{number}", session(50 * KIB))
        with Redis(unix_socket_path=small_redis.url.removeprefix("unix://")) as redis:
            assert redis.info("stats")["evicted_keys"] > 50
            assert redis.exists("scalellm:quota:{other}")
        await quotas.close()


async def test_a_turn_that_does_not_fit_is_told_and_a_full_tenant_is_told_before_its_turn(redis_process) -> None:
    async with stores(redis_process) as store_of:
        store = store_of(GREEDY)
        assert await store.save("long", session(500 * KIB)) is SaveOutcome.SAVED
        await store.check_room()
        assert await store.save("more", session(200 * KIB)) is SaveOutcome.FULL
        stored = await store.load("long")
        assert stored is not None
        grown = replace(stored, messages=(Message("user", "y" * 550 * KIB),))
        assert await store.save("long", grown) is SaveOutcome.SAVED, "only what is new counts"
        number = 0
        while await store.save(f"small{number}", session(KIB)) is SaveOutcome.SAVED:
            number += 1
        await store_of(OTHER).check_room()
        assert await store.delete("long")
        assert await store.save("more", session(200 * KIB)) is SaveOutcome.SAVED


async def test_counts_follow_expiry_eviction_and_deletion(redis_process) -> None:
    async with stores(redis_process, ttl=BRIEF) as brief:
        assert await fill(brief(GREEDY)) == 11
        await asyncio.sleep(BRIEF + 0.1)
        assert await fill(brief(GREEDY)) == 11, "what expired counts no more"
    async with stores(redis_process) as store_of:
        store = store_of(GREEDY)
        await asyncio.sleep(BRIEF + 0.1)
        assert await fill(store) == 11
        with Redis(unix_socket_path=redis_process.url.removeprefix("unix://")) as redis:
            redis.delete(*(f"scalellm:session:{{greedy}}:s{number}" for number in range(5)))  # as an eviction does
            for number in range(20, 25):
                assert await store.create(f"s{number}", session(50 * KIB))
            for name in [*range(5, 11), *range(20, 25)]:
                assert await store.delete(f"s{name}")
            assert int(redis.hget("scalellm:session-bytes:{greedy}", "")) == 0
            assert redis.zcard("scalellm:sessions:{greedy}") == 0


async def test_a_full_tenant_is_refused_before_work(redis_process) -> None:
    async with stores(redis_process) as store_of:
        assert await store_of(GREEDY).create("s", session(550 * KIB))
        lower = store_of(Tenant("greedy", TenantLimits(session_bytes=KIB)))  # the file was changed
        with pytest.raises(
            StatusError, match="session_bytes: the sessions of tenant 'greedy' hold 5[0-9]+ bytes"
        ) as full:
            await lower.check_room()
        assert full.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
