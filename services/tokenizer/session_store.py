"""Sessions in Redis: one round trip to load, one to save, and a bounded wait when Redis does not answer.

Keys begin with the tenant, so that no tenant can read, list or count another's sessions.
"""

from __future__ import annotations

import copy
import enum
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from redis.asyncio import Redis

from scalellm.services.common.api_keys import DEFAULT_TENANT, Tenant
from scalellm.services.common.cancellation import cancellable
from scalellm.services.common.errors import StatusError
from scalellm.services.common.logs import LineLimit
from scalellm.services.common.redis_client import KEY_PREFIX
from scalellm.services.common.redis_health import REDIS_ERRORS, RedisFault
from scalellm.services.common.silence import silence_limit
from scalellm.services.tokenizer import session_script
from scalellm.services.tokenizer.page_token import bad_page_token, make_page_token, read_page_token
from scalellm.services.tokenizer.session import (
    INFO_FIELDS,
    MODEL_FIELD,
    Session,
    SessionInfo,
    decode_info,
    decode_session,
    encode_session,
)
from scalellm.services.tokenizer.validation import is_id

_log = logging.getLogger(__name__)

_TIMEOUT = 1.0

_OVERHEAD = 512
"""Bytes that Redis takes for a session beside its fields, about."""

DEFAULT_BYTES = 128 * 2**20
"""Most bytes of a tenant's sessions: half of the Redis that `scalellm up` and Compose start."""

_LIMIT = "session_bytes"


class SaveOutcome(enum.Enum):
    """The outcome of saving a turn."""

    SAVED = enum.auto()
    CONFLICT = enum.auto()
    UNAVAILABLE = enum.auto()
    FULL = enum.auto()


_OUTCOMES = {1: SaveOutcome.SAVED, 0: SaveOutcome.CONFLICT, -1: SaveOutcome.FULL}


@dataclass(slots=True)
class _Failures:
    count: int = 0


class SessionStore:
    """One tenant's sessions by id.

    Every method raises StatusError UNAVAILABLE within about a second when Redis does not answer.

    Args:
        redis: The Redis that holds them; None: the service has none, and every method raises StatusError.
        ttl: Seconds after its last turn for which a session is kept.
        timeout: Longest wait for Redis, in seconds.
        tenant: The tenant.
        max_bytes: Most bytes of the sessions of a tenant without a limit of its own.
        refused: Called with the name of the limit for which a session was refused.
    """

    def __init__(
        self,
        redis: Redis | None,
        ttl: float,
        timeout: float = _TIMEOUT,
        tenant: Tenant = DEFAULT_TENANT,
        max_bytes: int = DEFAULT_BYTES,
        refused: Callable[[str], None] = lambda limit: None,
    ) -> None:
        self._redis = redis
        self._ttl = ttl
        self._timeout = timeout
        self._log_limit = LineLimit()
        self._failures = _Failures()
        self._default_bytes = max_bytes
        self._refused = refused
        self._select(tenant)

    @property
    def is_on(self) -> bool:
        """True if the service was started with a Redis."""
        return self._redis is not None

    @property
    def num_failures(self) -> int:
        """Number of failed Redis operations, of all tenants."""
        return self._failures.count

    def _select(self, tenant: Tenant) -> None:
        # In a Redis cluster, the part in braces decides the slot.
        self._keys = f"{KEY_PREFIX}session:{{{tenant.name}}}:"
        self._index = f"{KEY_PREFIX}sessions:{{{tenant.name}}}"
        self._sizes = f"{KEY_PREFIX}session-bytes:{{{tenant.name}}}"
        self._tenant = tenant.name
        self._max_bytes = tenant.limits.session_bytes or self._default_bytes

    def of(self, tenant: Tenant) -> SessionStore:
        """Return the sessions of another tenant, on the same connections."""
        other = copy.copy(self)
        other._select(tenant)
        return other

    async def load(self, session_id: str) -> Session | None:
        """Return a session, or None if it does not exist or has expired."""
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

    async def model_of(self, session_id: str) -> str:
        """Return the model of a session; empty if there is no session, or its model is not known."""
        async with self._reach() as redis:
            model: bytes | None = await redis.hget(self._keys + session_id, MODEL_FIELD)
        return (model or b"").decode(errors="replace")

    async def check_room(self) -> None:
        """Raise StatusError RESOURCE_EXHAUSTED if the tenant's limit is reached, before work is done for a turn."""
        async with self._reach() as redis:
            used = int(await redis.hget(self._sizes, "") or 0)
            if used >= self._max_bytes:
                used = await redis.eval(session_script.USED, 3, "", self._index, self._sizes, self._keys)
        if used >= self._max_bytes:
            raise self._full(used)

    def _full(self, used: int | None = None) -> StatusError:
        self._refused(_LIMIT)
        holds = f"hold {used} bytes, and " if used is not None else ""
        return StatusError(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            f"{_LIMIT}: the sessions of tenant {self._tenant!r} {holds}may hold {self._max_bytes} in all; delete some, "
            "or wait until they expire",
        )

    async def save(self, session_id: str, session: Session, version: str = "") -> SaveOutcome:
        """Store a turn, if the stored session is still the one that `session` continues. Never raises StatusError.

        Args:
            session_id: Id of the session.
            session: The session with the new turn.
            version: Version of the stored session; empty = a new one. If this version is stored already, nothing
                changes.
        """
        try:
            return await self._compare_and_set(session_id, session, version)
        except StatusError as error:
            if (held_back := self._log_limit.admit()) is not None:
                more = f" (and {held_back} before it)" if held_back else ""
                _log.warning("a turn of session %s%s is not stored: %s", session_id, more, error.message)
            return SaveOutcome.UNAVAILABLE

    async def create(self, session_id: str, session: Session) -> bool:
        """Store a session under a new id. False when the id is taken. Raises StatusError RESOURCE_EXHAUSTED."""
        outcome = await self._compare_and_set(session_id, session)
        if outcome is SaveOutcome.FULL:
            raise self._full()
        return outcome is SaveOutcome.SAVED

    async def delete(self, session_id: str) -> bool:
        """Remove a session. False when there was none."""
        async with self._reach() as redis:
            keys = (self._keys + session_id, self._index, self._sizes)
            return bool(await redis.eval(session_script.DELETE, 3, *keys, session_id))

    async def list(self, page_size: int, page_token: str) -> tuple[list[SessionInfo], str]:
        """Return a page of sessions in the order of their expiry, and the token of the next page, empty on the last.

        A session that gets another turn meanwhile moves to the end. A page is short if sessions have just expired.
        """
        last_expiry, last_id = _parse_token(page_token)
        found: list[tuple[int, str]] = []
        offset = 0
        async with self._reach() as redis:
            # Sessions that expire in the same millisecond are ordered by their names, as Redis sorts them.
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
        next_token = make_page_token(*page[-1]) if len(found) > page_size else ""
        return [info for info in infos if info is not None], next_token

    async def close(self) -> None:
        """Close the connections."""
        if self._redis is not None:
            await self._redis.aclose()

    async def _compare_and_set(self, session_id: str, session: Session, version: str = "") -> SaveOutcome:
        version, fields = encode_session(session, version)
        flat = [part for pair in fields.items() for part in pair]
        async with self._reach() as redis:
            keys = (self._keys + session_id, self._index, self._sizes)
            ttl_ms = str(int(self._ttl * 1000))
            size = _OVERHEAD + len(session_id) + sum(map(len, flat))
            what = (session.version, version, ttl_ms, session_id, self._keys, str(size), str(self._max_bytes))
            stored = await redis.eval(session_script.SAVE, 3, *keys, *what, *flat)
        return _OUTCOMES[stored]

    @asynccontextmanager
    async def _reach(self) -> AsyncIterator[Any]:
        if self._redis is None:
            raise StatusError.unavailable("sessions are off: the service was started without --redis-url")
        try:
            with cancellable():
                async with silence_limit(self._timeout):
                    yield self._redis
        except REDIS_ERRORS as error:
            self._failures.count += 1
            fault = RedisFault.of(error)
            # An error answer (read-only replica, out of memory, wrong type) is logged for the operator.
            if fault.answers and self._log_limit.admit() is not None:
                _log.error("%s: sessions cannot be used", fault.explain(error))
            cause = f"does not answer within {self._timeout:g} s" if fault is RedisFault.SLOW else fault.cause
            raise StatusError.unavailable(
                f"the session store {cause}; requests without session_id are served", retry_after=self._timeout
            ) from None


def _parse_token(token: str) -> tuple[int, str]:
    """Return the expiry (milliseconds since the epoch) and the id of the session after which the page begins."""
    if not token:
        return 0, ""
    expiry, name = read_page_token(token)
    if type(expiry) is int and 0 <= expiry < 2**53 and isinstance(name, str) and is_id(name):
        return expiry, name
    raise bad_page_token()
