"""Sessions in Redis: one round trip to load, one to save, and a bounded wait when Redis does not answer."""

from __future__ import annotations

import asyncio
import base64
import binascii
import enum
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError, ResponseError

from services.common.errors import StatusError
from services.common.logs import LineLimit
from services.common.redis_client import KEY_PREFIX
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

_PREFIX = f"{KEY_PREFIX}session:"
_TIMEOUT = 1.0
_MAX_SCANS = 64

# Compare and set: stores a hash only if the session's version is the expected one ("" = there is none). The client
# repeats it when a connection breaks before the answer: a session of the new version was stored the first time.
_SAVE = """
local version = redis.call('HGET', KEYS[1], 'version') or ''
if version == ARGV[2] then return 1 end
if version ~= ARGV[1] then return 0 end
redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[1], unpack(ARGV, 4))
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return 1
"""


class SaveOutcome(enum.Enum):
    """What became of a turn."""

    SAVED = enum.auto()
    CONFLICT = enum.auto()
    UNAVAILABLE = enum.auto()


class SessionStore:
    """Sessions by id. Every method raises StatusError UNAVAILABLE within about a second when Redis does not answer.

    Args:
        redis: Where they are; None: the service was started without, and every method says so.
        ttl: Seconds after its last turn for which a session is kept.
        timeout: Longest wait for Redis, in seconds.
    """

    def __init__(self, redis: Redis | None, ttl: float, timeout: float = _TIMEOUT) -> None:
        self._redis = redis
        self._ttl_ms = int(ttl * 1000)
        self._timeout = timeout
        self._log_limit = LineLimit()

    async def load(self, session_id: str) -> Session | None:
        """Return a session, or None when there is none (any more)."""
        found = await self.load_with_expiry(session_id)
        return found[0] if found is not None else None

    async def load_with_expiry(self, session_id: str) -> tuple[Session, float] | None:
        """Return a session and the seconds until it expires."""
        key = _PREFIX + session_id
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
            return bool(await redis.delete(_PREFIX + session_id))

    async def list(self, page_size: int, page_token: str) -> tuple[list[SessionInfo], str]:
        """Return a page of sessions and the token of the next page, empty on the last.

        Redis hands out keys a little more or less than asked for at a time; what a page cannot hold travels in its
        token. A page may be short, or empty, when there are many other keys.
        """
        cursor, names = _parse_token(page_token)
        async with self._reach() as redis:
            for _ in range(_MAX_SCANS):
                if len(names) >= page_size or cursor == 0:
                    break
                keys: list[bytes]
                count = max(10, page_size - len(names))
                cursor, keys = await redis.scan(cursor or 0, match=f"{_PREFIX}*", count=count)
                names += [key.removeprefix(_PREFIX.encode()).decode(errors="replace") for key in keys]
            names = [name for name in dict.fromkeys(names) if is_id(name)]
            page, names = names[:page_size], names[page_size:]
            pipeline = redis.pipeline(transaction=False)
            for name in page:
                pipeline.hmget(_PREFIX + name, INFO_FIELDS)
                pipeline.pttl(_PREFIX + name)
            answers = await pipeline.execute() if page else []
        infos = [decode_info(*row) for row in zip(page, answers[::2], answers[1::2], strict=True)]
        next_token = _make_token(cursor or 0, names) if cursor or names else ""
        return [info for info in infos if info is not None], next_token

    async def close(self) -> None:
        """Close the connections."""
        if self._redis is not None:
            await self._redis.aclose()

    async def _compare_and_set(self, session_id: str, session: Session) -> bool:
        version, fields = encode_session(session)
        flat = [part for pair in fields.items() for part in pair]
        async with self._reach() as redis:
            key = _PREFIX + session_id
            return bool(await redis.eval(_SAVE, 1, key, session.version, version, str(self._ttl_ms), *flat))

    @asynccontextmanager
    async def _reach(self) -> AsyncIterator[Any]:
        if self._redis is None:
            raise StatusError.unavailable("sessions are off: the service was started without --redis-url")
        try:
            async with asyncio.timeout(self._timeout):
                yield self._redis
        except TimeoutError:
            raise StatusError.unavailable(
                f"the session store does not answer within {self._timeout:g} s; requests without session_id are served",
                retry_after=self._timeout,
            ) from None
        except (RedisError, OSError) as error:
            # An answer that is an error (read-only replica, out of memory, wrong type) is for the operator to read.
            if isinstance(error, ResponseError) and self._log_limit.admit() is not None:
                _log.error("Redis refuses what sessions need, they cannot be used: %s", error)
            raise StatusError.unavailable(
                "the session store cannot be reached; requests without session_id are served", retry_after=self._timeout
            ) from None


def _make_token(cursor: int, names: list[str]) -> str:
    return base64.urlsafe_b64encode(json.dumps([cursor, names]).encode()).decode()


def _parse_token(token: str) -> tuple[int | None, list[str]]:
    """Return Redis' cursor (None: not begun, 0: at the end) and keys that it handed out already."""
    if not token:
        return None, []
    try:
        cursor, names = json.loads(base64.b64decode(token, altchars=b"-_", validate=True))
        if type(cursor) is int and 0 <= cursor < 2**64 and all(is_id(name) for name in names):
            return cursor, list(names)
    except (binascii.Error, ValueError, TypeError, RecursionError):
        pass
    raise StatusError.invalid("page_token", "must be empty or the next_page_token of an earlier answer")
