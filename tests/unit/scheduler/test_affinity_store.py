"""The copy of sessions' executors in Redis: its loops end when they are told to."""

from __future__ import annotations

import asyncio

import pytest

from scalellm.services.common import redis_health
from scalellm.services.scheduler import affinity_store
from scalellm.services.scheduler.affinity_store import AffinityStore
from service_processes import PATIENCE


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

    def pipeline(self, transaction: bool) -> FakeRedisThatLosesCancellations:
        return self

    async def __aenter__(self) -> FakeRedisThatLosesCancellations:
        return self

    async def __aexit__(self, *_: object) -> None: ...

    def set(self, key: str, value: str, ex: int) -> None:
        self._name = "write"

    def get(self, key: str) -> None:
        self._name = "read"

    async def execute(self) -> list[None]:
        await self._answer(self._name)
        return [None]

    async def aclose(self) -> None: ...


async def test_a_cancellation_that_redis_loses_ends_all_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    redis = FakeRedisThatLosesCancellations()
    monkeypatch.setattr(affinity_store, "open_redis", lambda url, timeout: redis)
    monkeypatch.setattr(redis_health, "probe_redis", lambda redis, sessions: redis._answer("probe"))
    store = AffinityStore("redis://fake", ttl=60.0)
    running = asyncio.create_task(store.run())
    async with asyncio.timeout(PATIENCE):
        assert await redis.stuck.get() == "probe"
        store._watch.report(None)
        store.record("written", "h:1")
        looked_up = store.look_up("read")
        assert {await redis.stuck.get(), await redis.stuck.get()} == {"read", "write"}
        store._watch.report(OSError())  # nothing is written at the end
    running.cancel()
    await asyncio.wait([running], timeout=PATIENCE)
    assert running.cancelled()
    assert looked_up.result() is None
