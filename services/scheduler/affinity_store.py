"""The last executor of each session: in memory, with a copy in Redis for the time after a restart."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict

from redis.asyncio import Redis

from scalellm.services.common.cancellation import cancellable
from scalellm.services.common.redis_client import KEY_PREFIX, open_redis
from scalellm.services.common.redis_health import REDIS_ERRORS, RedisWatch

_log = logging.getLogger(__name__)

_TICK = 0.05
_LOOK_UP_LIMIT = 0.05


class AffinityStore:
    """Session -> executor address. A hint: losing it costs a prefill.

    Writes gather in a buffer that one task empties with one pipeline per tick; while Redis is away they are dropped.
    Reads happen only for sessions that this process has not seen, many at once, and are waited for a twentieth of a
    second at most.

    Args:
        url: URL of Redis; None = in memory only.
        ttl: Seconds after which Redis forgets a session.
        capacity: Sessions remembered in memory; the least recently used are forgotten first.
        max_pending: Sessions whose write may wait; more are dropped.
    """

    def __init__(self, url: str | None, ttl: float, *, capacity: int = 100_000, max_pending: int = 10_000) -> None:
        self._redis: Redis | None = open_redis(url, timeout=0.5) if url is not None else None
        self._ttl = max(1, int(ttl))
        self._capacity = capacity
        self._max_pending = max_pending
        self._known: OrderedDict[str, str] = OrderedDict()
        self._pending: dict[str, str] = {}
        self._wanted: dict[str, asyncio.Future[str | None]] = {}
        self._write_due = asyncio.Event()
        self._read_due = asyncio.Event()
        self._watch: RedisWatch | None = None
        if self._redis is not None:
            self._watch = RedisWatch(self._redis, sessions=False, without="sessions lose their executor on a restart")
        self._num_failed_reads = 0

    @property
    def redis_ok(self) -> bool:
        """True if Redis does what the services need."""
        return self._watch is not None and self._watch.is_up

    @property
    def num_failures(self) -> int:
        """Number of failed Redis operations."""
        return self._num_failed_reads + (self._watch.num_failures if self._watch is not None else 0)

    @property
    def has_redis(self) -> bool:
        """True if a Redis is configured."""
        return self._redis is not None

    def get(self, session_id: str) -> str | None:
        """Return the executor that ran the session last, or None if this process does not know it."""
        address = self._known.get(session_id)
        if address is not None:
            self._known.move_to_end(session_id)
        return address

    def record(self, session_id: str, address: str) -> None:
        """Remember that the session runs on the executor at this address, and have it written to Redis."""
        self._known[session_id] = address
        self._known.move_to_end(session_id)
        if len(self._known) > self._capacity:
            self._known.popitem(last=False)
        if self.redis_ok and (len(self._pending) < self._max_pending or session_id in self._pending):
            self._pending[session_id] = address
            self._write_due.set()

    def look_up(self, session_id: str) -> asyncio.Future[str | None]:
        """Read the session's executor from Redis. The result is None if Redis does not know it or does not answer in
        time.
        """
        future = self._wanted.get(session_id)
        if future is None:
            loop = asyncio.get_running_loop()
            if not self._wanted:  # one timer for all that are asked for at once
                loop.call_later(_LOOK_UP_LIMIT, self._give_up, self._wanted)
                self._read_due.set()
            future = self._wanted[session_id] = loop.create_future()
        return future

    def _give_up(self, wanted: dict[str, asyncio.Future[str | None]]) -> None:
        """Resolve look-ups that Redis has not answered in time. The read itself is not cancelled, since the Redis
        client does not end promptly when cancelled.
        """
        if wanted is self._wanted:
            self._wanted = {}
        for future in wanted.values():
            if not future.done():
                future.set_result(None)

    async def run(self) -> None:
        """Watch Redis and write to it until cancelled; then write what is left."""
        if self._redis is None or self._watch is None:
            return
        redis, watch = self._redis, self._watch
        try:
            await asyncio.gather(watch.run(), self._write(redis, watch), self._read(redis))
        finally:
            if watch.is_up:
                await self._flush(redis, watch)
            await redis.aclose()

    async def _write(self, redis: Redis, watch: RedisWatch) -> None:
        while True:
            await self._write_due.wait()
            await asyncio.sleep(_TICK)
            self._write_due.clear()
            with cancellable():
                await self._flush(redis, watch)

    async def _read(self, redis: Redis) -> None:
        while True:
            await self._read_due.wait()
            self._read_due.clear()
            wanted, self._wanted = self._wanted, {}
            if not wanted:
                continue
            try:
                with cancellable():
                    # not MGET: in a Redis cluster the keys lie on several nodes
                    pipeline = redis.pipeline(transaction=False)
                    for session_id in wanted:
                        pipeline.get(_key(session_id))
                    values = await pipeline.execute()
            except REDIS_ERRORS as error:
                self._num_failed_reads += 1
                _log.debug("no affinity from Redis: %r", error)
                values = [None] * len(wanted)
            for future, value in zip(wanted.values(), values, strict=True):
                if not future.done():
                    future.set_result(value.decode(errors="replace") if isinstance(value, bytes) else value)

    async def _flush(self, redis: Redis, watch: RedisWatch) -> None:
        pending, self._pending = self._pending, {}
        if not pending:
            return
        try:
            async with redis.pipeline(transaction=False) as pipeline:
                for session_id, address in pending.items():
                    pipeline.set(_key(session_id), address, ex=self._ttl)
                await pipeline.execute()
        except REDIS_ERRORS as error:
            watch.report(error)
            self._pending.clear()


def _key(session_id: str) -> str:
    return f"{KEY_PREFIX}affinity:{session_id}"
