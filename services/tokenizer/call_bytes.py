"""Accounting of the bytes that calls hold in a worker: read requests, answers not yet taken, and messages under way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc

from scalellm.services.common.errors import StatusError

_MAX_READING = 64
"""Calls of one tenant and connection whose requests are read at once. Further ones are bounded by flow control."""

_READ_LIMIT = 60.0
"""Seconds within which a request has to be complete: 1 MiB comes in that time at 140 kbit/s."""

_RETRY_AFTER = 1.0


@dataclass(slots=True)
class _Holder:
    """The bytes held for a tenant, or for a tenant on one connection."""

    max_bytes: int
    bytes: int = 0
    num_calls: int = 0
    reading: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_MAX_READING))


@dataclass(slots=True)
class CallAccount:
    """The bytes held for one call."""

    _holders: tuple[tuple[str, _Holder], ...]
    _read_limit: float
    bytes: int = 0

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[None]:
        """Context for reading the call's request. Raises StatusError DEADLINE_EXCEEDED if that takes too long."""
        try:
            async with asyncio.timeout(self._read_limit), self._holders[-1][1].reading:
                yield
        except TimeoutError:
            raise StatusError(
                grpc.StatusCode.DEADLINE_EXCEEDED, f"request: was not complete within {self._read_limit:g} s"
            ) from None

    def hold(self, num_bytes: int) -> None:
        """Count `num_bytes` more bytes as held until the call ends. Raises StatusError RESOURCE_EXHAUSTED over the
        limit.
        """
        for whose, holder in self._holders:
            if holder.bytes and holder.bytes + num_bytes > holder.max_bytes:
                raise StatusError(
                    grpc.StatusCode.RESOURCE_EXHAUSTED,
                    f"requests and unread answers of {whose} hold {holder.bytes} bytes here, {num_bytes} more exceed "
                    f"the limit of {holder.max_bytes}; take the answers, and retry in {_RETRY_AFTER} s",
                    retry_after=_RETRY_AFTER,
                )
        self.bytes += num_bytes
        for _, holder in self._holders:
            holder.bytes += num_bytes


class CallBytes:
    """Limits the bytes that calls hold in this process, per tenant and, within it, per connection.

    Args:
        max_tenant_bytes: Most bytes of one tenant. A single message is always accepted.
        max_connection_bytes: Most bytes of one tenant on one connection.
        read_limit: Seconds within which a request has to be complete.
    """

    def __init__(
        self,
        max_tenant_bytes: int = 128 * 2**20,
        max_connection_bytes: int = 32 * 2**20,
        read_limit: float = _READ_LIMIT,
    ) -> None:
        self._max_tenant_bytes = max_tenant_bytes
        self._max_connection_bytes = max_connection_bytes
        self._read_limit = read_limit
        self._holders: dict[tuple[str, str], _Holder] = {}

    @property
    def num_bytes(self) -> int:
        """Bytes held now for all callers."""
        return sum(self._by_tenant())

    @property
    def largest_bytes(self) -> int:
        """Bytes held now for the tenant that holds most."""
        return max(self._by_tenant(), default=0)

    @property
    def max_tenant_bytes(self) -> int:
        """Most bytes of one tenant."""
        return self._max_tenant_bytes

    def _by_tenant(self) -> list[int]:
        return [holder.bytes for (_, peer), holder in self._holders.items() if not peer]

    @asynccontextmanager
    async def call(self, tenant: str, peer: str) -> AsyncIterator[CallAccount]:
        """Context of a call. The bytes that it holds are released at its end.

        Args:
            tenant: Name of the tenant on whose behalf it runs.
            peer: Identifies the connection by which it came.
        """
        keys = {(tenant, ""): self._max_tenant_bytes, (tenant, peer): self._max_connection_bytes}
        holders = []
        for key, limit in keys.items():
            holder = self._holders.setdefault(key, _Holder(limit))
            holder.num_calls += 1
            holders.append((f"tenant {tenant!r}" + (" on this connection" if key[1] else ""), holder))
        account = CallAccount(tuple(holders), self._read_limit)
        try:
            yield account
        finally:
            for key in keys:
                holder = self._holders[key]
                holder.bytes -= account.bytes
                holder.num_calls -= 1
                if not holder.num_calls:
                    del self._holders[key]
