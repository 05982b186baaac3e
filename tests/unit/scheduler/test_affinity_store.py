"""The copy of sessions' executors in Redis: its loops end when they are told to."""

from __future__ import annotations

import asyncio

import pytest

from service_processes import PATIENCE
from services.scheduler import affinity_store
from services.scheduler.affinity_store import AffinityStore


class FakeRedisThatLosesCancellations:
    """Answers each command once when it is cancelled, as Redis' client does in Python 3.11 when both come at once."""

    def __init__(self) -> None:
        self.stuck: asyncio.Queue[str] = asyncio.Queue()
        self._lost: set[str] = set()

    async def _answer(self, name: str) -> None:
        self.stuck.put_nowait(name)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if name in self._lost:
                raise
            self._lost.add(name)

    async def ping(self) -> None:
        await self._answer("ping")

    async def mget(self, keys: list[str]) -> list[None]:
        await self._answer("mget")
        return [None] * len(keys)

    def pipeline(self, transaction: bool) -> FakeRedisThatLosesCancellations:
        return self

    async def __aenter__(self) -> FakeRedisThatLosesCancellations:
        return self

    async def __aexit__(self, *_: object) -> None: ...

    def set(self, key: str, value: str, ex: int) -> None: ...

    async def execute(self) -> None:
        await self._answer("execute")

    async def aclose(self) -> None: ...


async def test_a_cancellation_that_redis_loses_ends_all_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    redis = FakeRedisThatLosesCancellations()
    monkeypatch.setattr(affinity_store, "open_redis", lambda url, timeout: redis)
    store = AffinityStore("redis://fake", ttl=60.0)
    running = asyncio.create_task(store.run())
    async with asyncio.timeout(PATIENCE):
        assert await redis.stuck.get() == "ping"
        store.redis_ok = True
        store.record("written", "h:1")
        looked_up = store.look_up("read")
        assert {await redis.stuck.get(), await redis.stuck.get()} == {"mget", "execute"}
        store.redis_ok = False  # nothing is written at the end
    running.cancel()
    await asyncio.wait([running], timeout=PATIENCE)
    assert running.cancelled()
    assert looked_up.result() is None
