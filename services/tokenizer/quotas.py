"""Tenants' limits, counted over all worker processes in Redis.

A request of a tenant with limits costs one round trip to Redis, before any other work; one without limits costs none.
The ends of requests are reported in the background.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import grpc
from redis.asyncio import Redis

from scalellm.services.common.api_keys import Tenant, TenantLimits
from scalellm.services.common.cancellation import cancellable
from scalellm.services.common.errors import StatusError
from scalellm.services.common.redis_client import KEY_PREFIX
from scalellm.services.common.redis_health import REDIS_ERRORS, RedisFault
from scalellm.services.tokenizer.quota_script import QUOTA_SCRIPT

_log = logging.getLogger(__name__)

_MINUTE = 60.0
_LEASE = 30.0
"""Seconds after which the running requests of a worker that no longer reports cease to count. Workers report three
times within that time."""

_RETRY_REDIS = 1.0
_RETRY_CONCURRENT = 1.0
_SHORTEST_RETRY = 0.1


@dataclass(slots=True, eq=False)
class _Account:
    """One tenant's usage in this process. The level of a leaky bucket is stored as the time at which it will be empty.

    Attributes:
        tenant: Its name.
        key: Key of the hash in Redis in which all processes count.
        limits: Its limits.
    """

    tenant: str
    key: str
    limits: TenantLimits
    running: int = 0
    unreported_tokens: int = 0
    requests_until: float = 0.0
    tokens_until: float = 0.0


@dataclass(slots=True, eq=False)
class Lease:
    """The admission of one request. `end` must be called once."""

    _quotas: TenantQuotas
    _account: _Account
    _reserved: int = 0

    async def reserve(self, tokens: int) -> None:
        """Charge the most tokens that the request may use, before it runs. Raises StatusError RESOURCE_EXHAUSTED."""
        limit = self._account.limits.tokens_per_minute
        if limit is None:
            return
        self._reserved = min(tokens, limit)  # at most a full bucket is charged
        try:
            await self._quotas._reserve(self._account, self._reserved)
        except StatusError:
            self._reserved = 0
            raise

    def go_on(self, tokens: int) -> None:
        """Tell that `tokens` tokens of the request were charged already, by the worker from which it was taken over."""
        self._reserved = tokens

    def end(self, tokens: int) -> None:
        """End the request, which has used `tokens` tokens; the rest of its reservation is given back."""
        self._quotas._end(self._account, tokens - self._reserved)


@dataclass(frozen=True, slots=True)
class _Refusal:
    limit: str
    retry_after: float

    def to_error(self, account: _Account) -> StatusError:
        value, retry_after = getattr(account.limits, self.limit), max(self.retry_after, _SHORTEST_RETRY)
        what = "at once" if self.limit == "concurrent_requests" else "per minute, over all its requests"
        return StatusError(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            f"{self.limit}: tenant {account.tenant!r} may use {value} {what}; retry in {retry_after:.1f} s",
            retry_after=retry_after,
        )


@dataclass(slots=True, eq=False)
class TenantQuotas:
    """Admits requests within the limits of their tenants, while `run` runs.

    Rates are leaky buckets that hold one minute's worth. A request's tokens are charged when its prompt is known, with
    the longest answer that it may have; unused ones are given back at its end. Any request is admitted while the bucket
    is not full, whatever its size, so that no request is too large forever; later ones wait until the excess has
    drained. While Redis is away each process applies the limits on its own, so that a tenant may use up to its limit
    times the number of processes.

    Attributes:
        redis: Redis in which processes share counts; None: each one is alone.
        worker: Name of this process.
        lease: See _LEASE.
        clock: Monotonic seconds.
        is_shared: True if the limits now hold over all processes.
        num_failures: Number of failed Redis operations.
        refused: Called with the name of the limit for which a request was refused.
    """

    redis: Redis | None
    worker: str
    lease: float = _LEASE
    clock: Callable[[], float] = time.monotonic
    refused: Callable[[str], None] = lambda limit: None
    is_shared: bool = field(init=False)
    num_failures: int = field(init=False, default=0)
    _accounts: dict[str, _Account] = field(default_factory=dict)
    _dirty: set[_Account] = field(default_factory=set)
    _wake: asyncio.Event = field(default_factory=asyncio.Event)
    _sequence: int = 0
    _retry_redis_at: float = 0.0

    def __post_init__(self) -> None:
        self.is_shared = self.redis is not None

    @property
    def is_degraded(self) -> bool:
        """True if the limits should hold over all processes, but are applied in this one alone, as Redis is away."""
        return self.redis is not None and not self.is_shared

    async def admit(self, tenant: Tenant, priority: int = 0) -> Lease | None:
        """Admit a request. Returns None if its tenant has no limits. Raises StatusError RESOURCE_EXHAUSTED, or
        INVALID_ARGUMENT for a priority that the tenant may not use.
        """
        limits = tenant.limits
        if priority < limits.min_priority:
            self.refused("min_priority")
            raise StatusError.invalid(
                "priority", f"must be at least {limits.min_priority} for tenant {tenant.name!r}, got {priority}"
            )
        if not limits.is_counted:
            return None
        return await self._enter(tenant.name, "", limits)

    async def _enter(self, tenant: str, kind: str, limits: TenantLimits) -> Lease:
        key = f"{KEY_PREFIX}quota:{{{tenant}}}{kind}"
        account = self._accounts.setdefault(key, _Account(tenant, key, limits))
        account.limits = limits  # they may have changed
        account.running += 1
        try:
            await self._check(account)
        except BaseException:
            account.running -= 1
            self._report(account)  # Redis may have admitted it before we were cancelled
            raise
        return Lease(self, account)

    @contextlib.asynccontextmanager
    async def admitted(self, tenant: Tenant) -> AsyncIterator[None]:
        """Context of a request that uses no tokens. Raises StatusError RESOURCE_EXHAUSTED."""
        lease = await self.admit(tenant)
        try:
            yield
        finally:
            if lease is not None:
                lease.end(0)

    @contextlib.asynccontextmanager
    async def reading(self, tenant: Tenant) -> AsyncIterator[None]:
        """Context of a call that reads a kept answer which another call began. Raises StatusError RESOURCE_EXHAUSTED.

        Such calls have a limit of their own, equal to that of running requests, because a client that reconnects must
        be admitted while its request, and its broken connection, still count.
        """
        if (most := tenant.limits.concurrent_requests) is None:
            yield
            return
        lease = await self._enter(tenant.name, ":readers", TenantLimits(concurrent_requests=most))
        try:
            yield
        finally:
            lease.end(0)

    async def run(self) -> None:
        """Report ended requests to Redis, and renew the running ones, until cancelled."""
        loop = asyncio.get_running_loop()
        renewal = loop.time() + self.lease / 3
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(renewal):
                    await self._wake.wait()
            self._wake.clear()
            if loop.time() >= renewal:
                renewal = loop.time() + self.lease / 3
                self._dirty.update(account for account in self._accounts.values() if account.running)
            if not self._may_ask_redis():
                await asyncio.sleep(_RETRY_REDIS / 4)
                self._wake.set()
                continue
            dirty, self._dirty = self._dirty, set()
            for account in dirty:
                await self._ask_redis(account, admit=False)

    async def close(self) -> None:
        """Close the connections."""
        if self.redis is not None:
            await self.redis.aclose()

    async def _check(self, account: _Account) -> None:
        limits = account.limits
        refusal: _Refusal | None = None
        if limits.concurrent_requests is not None and account.running > limits.concurrent_requests:
            refusal = _Refusal("concurrent_requests", _RETRY_CONCURRENT)
        elif self._may_ask_redis():
            refusal = await self._ask_redis(account, admit=True)
        if refusal is None and not self.is_shared:
            refusal = self._check_alone(account)
        if refusal is not None:
            self.refused(refusal.limit)
            raise refusal.to_error(account)
        if limits.requests_per_minute is not None:
            account.requests_until = max(account.requests_until, self.clock()) + _MINUTE / limits.requests_per_minute

    def _check_alone(self, account: _Account) -> _Refusal | None:
        if (refusal := self._check_tokens(account)) is not None:
            return refusal
        limits, now = account.limits, self.clock()
        if limits.requests_per_minute is not None:
            over = max(account.requests_until, now) + _MINUTE / limits.requests_per_minute - now - _MINUTE
            if over > 0:
                return _Refusal("requests_per_minute", over)
        return None

    def _check_tokens(self, account: _Account) -> _Refusal | None:
        is_limited = account.limits.tokens_per_minute is not None
        if is_limited and (over := account.tokens_until - self.clock() - _MINUTE) >= 0:
            return _Refusal("tokens_per_minute", over)
        return None

    async def _reserve(self, account: _Account, tokens: int) -> None:
        refusal: _Refusal | None = None
        if self._may_ask_redis():
            try:
                refusal = await self._ask_redis(account, admit=False, reserve=tokens)
            except BaseException:
                self._fill(account, tokens)  # Redis may have charged them before we were cancelled; `_end` returns them
                raise
        if refusal is None and not self.is_shared:
            refusal = self._check_tokens(account)
            if refusal is None:
                account.unreported_tokens += tokens
        if refusal is not None:
            self.refused(refusal.limit)
            raise refusal.to_error(account)
        self._fill(account, tokens)

    def _fill(self, account: _Account, tokens: int) -> None:
        if (limit := account.limits.tokens_per_minute) is not None:
            now = self.clock()
            account.tokens_until = max(now, max(account.tokens_until, now) + tokens * _MINUTE / limit)

    def _end(self, account: _Account, tokens: int) -> None:
        account.running -= 1
        account.unreported_tokens += tokens
        self._fill(account, tokens)
        self._report(account)

    def _report(self, account: _Account) -> None:
        if self.redis is not None:
            self._dirty.add(account)
            self._wake.set()

    def _may_ask_redis(self) -> bool:
        return self.redis is not None and self.clock() >= self._retry_redis_at

    async def _ask_redis(self, account: _Account, *, admit: bool, reserve: int = 0) -> _Refusal | None:
        """Report the usage to Redis, and ask for the admission of a request or for tokens. A failure clears
        `is_shared`.
        """
        assert self.redis is not None
        limits = account.limits
        tokens, account.unreported_tokens = account.unreported_tokens, 0
        self._sequence += 1
        try:
            with cancellable():
                limit, retry_ms = await self.redis.eval(
                    QUOTA_SCRIPT,
                    1,
                    account.key,
                    self.worker,
                    str(self._sequence),
                    str(account.running),
                    str(int(self.lease * 1e3)),
                    str(int(admit)),
                    str(tokens),
                    str(limits.concurrent_requests or 0),
                    str(limits.requests_per_minute or 0),
                    str(limits.tokens_per_minute or 0),
                    str(reserve),
                )
                tokens = 0  # Redis has them, even if we are cancelled now
        except REDIS_ERRORS as error:
            account.unreported_tokens += tokens
            self._report(account)
            self._retry_redis_at = self.clock() + _RETRY_REDIS
            if self.is_shared:
                why = RedisFault.of(error).explain(error)
                _log.warning("%s, each process keeps to the tenants' limits on its own", why)
            self.is_shared = False
            self.num_failures += 1
            return None
        except BaseException:
            account.unreported_tokens += tokens
            self._report(account)
            raise
        if not self.is_shared:
            _log.info("Redis answers, the tenants' limits are shared again")
        self.is_shared = True
        if not limit:
            return None
        name = limit.decode()
        return _Refusal(name, retry_ms / 1e3 if name != "concurrent_requests" else _RETRY_CONCURRENT)
