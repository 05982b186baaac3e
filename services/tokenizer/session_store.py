"""Sessions in Redis: one round trip to load, one to save, and a bounded wait when Redis does not answer.

Keys begin with the tenant: no tenant reaches, lists or counts what is another's.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import copy
import enum
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis

from services.common.api_keys import DEFAULT_TENANT, Tenant
from services.common.cancellation import cancellable
from services.common.errors import StatusError
from services.common.logs import LineLimit
from services.common.redis_client import KEY_PREFIX
from services.common.redis_health import REDIS_ERRORS, RedisFault
from services.tokenizer.session import (
    INFO_FIELDS,
    Session,
    SessionInfo,
    decode_info,
    decode_session,
    encode_session,
)
from services.tokenizer.validation import is_id

_log = logging.getLogger(__name__)

_TIMEOUT = 1.0

# Compare and set: stores a hash only if the session's version is the expected one ("" = there is none). The client
# repeats it when a connection breaks before the answer: a session of the new version was stored the first time. The
# tenant's index, by time of expiry, is brought up to date.
_SAVE = """
local version = redis.call('HGET', KEYS[1], 'version') or ''
if version == ARGV[2] then return 1 end
if version ~= ARGV[1] then return 0 end
redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[1], unpack(ARGV, 5))
redis.call('PEXPIRE', KEYS[1], ARGV[3])
local time, ttl = redis.call('TIME'), tonumber(ARGV[3])
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now)
redis.call('ZADD', KEYS[2], now + ttl, ARGV[4])
if redis.call('PTTL', KEYS[2]) < ttl then redis.call('PEXPIRE', KEYS[2], ttl) end
return 1
"""


class SaveOutcome(enum.Enum):
    """What became of a turn."""

    SAVED = enum.auto()
    CONFLICT = enum.auto()
    UNAVAILABLE = enum.auto()


@dataclass(slots=True)
class _Failures:
    count: int = 0


class SessionStore:
    """One tenant's sessions by id.

    Every method raises StatusError UNAVAILABLE within about a second when Redis does not answer.

    Args:
        redis: Where they are; None: the service was started without, and every method says so.
        ttl: Seconds after its last turn for which a session is kept.
        timeout: Longest wait for Redis, in seconds.
        tenant: Whose they are.
    """

    def __init__(
        self, redis: Redis | None, ttl: float, timeout: float = _TIMEOUT, tenant: str = DEFAULT_TENANT.name
    ) -> None:
        self._redis = redis
        self._ttl = ttl
        self._timeout = timeout
        self._log_limit = LineLimit()
        self._failures = _Failures()
        self._select(tenant)

    @property
    def num_failures(self) -> int:
        """Operations of all tenants that Redis did not do."""
        return self._failures.count

    def _select(self, tenant: str) -> None:
        self._keys = f"{KEY_PREFIX}session:{tenant}:"
        self._index = f"{KEY_PREFIX}sessions:{tenant}"

    def of(self, tenant: Tenant) -> SessionStore:
        """The sessions of another tenant, on the same connections."""
        other = copy.copy(self)
        other._select(tenant.name)
        return other

    async def load(self, session_id: str) -> Session | None:
        """Return a session, or None when there is none (any more)."""
        found = await self.load_with_expiry(session_id)
        return found[0] if found is not None else None

    async def load_with_expiry(self, session_id: str) -> tuple[Session, float] | None:
        """Return a session and the seconds until it expires."""
        key = self._keys + session_id
        async with self._reach() as redis:
            pipeline = redis.pipeline(transaction=False)
            pipeline.hgetall(key)
            pipeline.pttl(key)
            fields, ttl_ms = await pipeline.execute()
        if not fields:
            return None
        try:
            return decode_session(fields), max(0, ttl_ms) / 1e3
        except ValueError as error:
            if self._log_limit.admit() is not None:
                _log.error("Redis key %s holds something else than a session: %s", key, error)
            raise StatusError.unavailable(f"session {session_id!r} cannot be read; delete it") from None

    async def save(self, session_id: str, session: Session) -> SaveOutcome:
        """Store a turn, if the stored session is still the one that `session` continues. Never raises StatusError."""
        try:
            stored = await self._compare_and_set(session_id, session)
        except StatusError as error:
            if (held_back := self._log_limit.admit()) is not None:
                more = f" (and {held_back} before it)" if held_back else ""
                _log.warning("a turn of session %s%s is not stored: %s", session_id, more, error.message)
            return SaveOutcome.UNAVAILABLE
        return SaveOutcome.SAVED if stored else SaveOutcome.CONFLICT

    async def create(self, session_id: str, session: Session) -> bool:
        """Store a session under a new id. False when the id is taken."""
        return await self._compare_and_set(session_id, session)

    async def delete(self, session_id: str) -> bool:
        """Remove a session. False when there was none."""
        async with self._reach() as redis:
            pipeline = redis.pipeline(transaction=False)
            pipeline.delete(self._keys + session_id)
            pipeline.zrem(self._index, session_id)
            deleted, _ = await pipeline.execute()
        return bool(deleted)

    async def list(self, page_size: int, page_token: str) -> tuple[list[SessionInfo], str]:
        """Return a page of sessions, those that expire first first, and the token of the next page, empty on the last.

        A session that gets another turn meanwhile moves to the end. A page is short where sessions have just ended.
        """
        last_expiry, last_id = _parse_token(page_token)
        found: list[tuple[int, str]] = []
        offset = 0
        async with self._reach() as redis:
            # Sessions of one millisecond are told apart by their names, as Redis itself sorts them.
            while len(found) <= page_size:
                rows: list[tuple[bytes, float]] = await redis.zrangebyscore(
                    self._index, last_expiry, "+inf", start=offset, num=page_size + 1, withscores=True
                )
                entries = [(int(expiry), name.decode()) for name, expiry in rows]
                found += [entry for entry in entries if entry > (last_expiry, last_id)]
                offset += len(rows)
                if len(rows) <= page_size:
                    break
            page = found[:page_size]
            pipeline = redis.pipeline(transaction=False)
            for _, name in page:
                pipeline.hmget(self._keys + name, INFO_FIELDS)
                pipeline.pttl(self._keys + name)
            answers = await pipeline.execute() if page else []
        infos = [decode_info(name, *row) for (_, name), *row in zip(page, answers[::2], answers[1::2], strict=True)]
        next_token = _make_token(*page[-1]) if len(found) > page_size else ""
        return [info for info in infos if info is not None], next_token

    async def close(self) -> None:
        """Close the connections."""
        if self._redis is not None:
            await self._redis.aclose()

    async def _compare_and_set(self, session_id: str, session: Session) -> bool:
        version, fields = encode_session(session)
        flat = [part for pair in fields.items() for part in pair]
        async with self._reach() as redis:
            keys = (self._keys + session_id, self._index)
            ttl_ms = str(int(self._ttl * 1000))
            return bool(await redis.eval(_SAVE, 2, *keys, session.version, version, ttl_ms, session_id, *flat))

    @asynccontextmanager
    async def _reach(self) -> AsyncIterator[Any]:
        if self._redis is None:
            raise StatusError.unavailable("sessions are off: the service was started without --redis-url")
        try:
            with cancellable():
                async with asyncio.timeout(self._timeout):
                    yield self._redis
        except REDIS_ERRORS as error:
            self._failures.count += 1
            fault = RedisFault.of(error)
            # An answer that is an error (read-only replica, out of memory, wrong type) is for the operator to read.
            if fault.answers and self._log_limit.admit() is not None:
                _log.error("%s: sessions cannot be used", fault.explain(error))
            cause = f"does not answer within {self._timeout:g} s" if fault is RedisFault.SLOW else fault.cause
            raise StatusError.unavailable(
                f"the session store {cause}; requests without session_id are served", retry_after=self._timeout
            ) from None


def _make_token(expiry: int, name: str) -> str:
    return base64.urlsafe_b64encode(json.dumps([expiry, name]).encode()).decode()


def _parse_token(token: str) -> tuple[int, str]:
    """Return the expiry (milliseconds since the epoch) and the id of the session after which the page begins."""
    if not token:
        return 0, ""
    try:
        expiry, name = json.loads(base64.b64decode(token, altchars=b"-_", validate=True))
        if type(expiry) is int and 0 <= expiry < 2**53 and is_id(name):
            return expiry, name
    except (binascii.Error, ValueError, TypeError, RecursionError):
        pass
    raise StatusError.invalid("page_token", "must be empty or the next_page_token of an earlier answer")
