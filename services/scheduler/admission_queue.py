"""Requests that wait for an executor: bounded, by priority, fair to tenants, aware of deadlines."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Collection, Iterator
from heapq import heapify, heappop, heapreplace
from typing import Generic, Protocol

import grpc

from scalellm.services.common.errors import StatusError
from scalellm.services.scheduler.tenant_shares import EntryT, NoRoomError, QueueEntry, TenantShares

_RETRY_AFTER_UNKNOWN = 1.0
_RETRY_AFTER_RANGE = (0.1, 60.0)
_LONGEST_FULL = 0.25
"""Most seconds for which a refusal says that the queue stays full: room may come earlier than predicted, because
clients leave or an executor joins."""


class QueueFullError(StatusError):
    """The queue has no place for another request of a tenant, however small.

    Args:
        message: See StatusError.
        retry_after: See StatusError.
        lasts: Seconds for which the next requests of the same tenant need not be sent. No more than a tenth of the
            queue leaves in that time, so that it does not run dry.
    """

    def __init__(self, message: str, retry_after: float | None, lasts: float) -> None:
        super().__init__(grpc.StatusCode.RESOURCE_EXHAUSTED, message, retry_after=retry_after)
        self.lasts = lasts


class TenantAccounts(Protocol):
    """The accounts of the tenants whose requests wait in the queue, or come to it."""

    def served(self, tenant: bytes) -> float:
        """Return the tenant's tokens served so far divided by its weight. Only comparisons between tenants mean
        anything.
        """

    def weight(self, tenant: bytes) -> float:
        """Return the tenant's weight: its share of the service in relation to other tenants."""


class AdmissionQueue(Generic[EntryT]):
    """Waiting requests in dispatch order: by priority, then by tenant (the one served least goes first), then by
    arrival. When the queue is full, requests of the tenant that holds most of it, relative to its weight, are dropped
    for those of tenants that hold less.

    Sorted lists: with a few thousand entries an insertion or removal moves some kilobytes, which is cheaper than what
    any tree does in Python.

    Args:
        max_requests: Most requests.
        max_tokens: Most prompt tokens. One request that is larger may still wait alone.
        accounts: Accounts of the tenants.
    """

    def __init__(self, max_requests: int, max_tokens: int, accounts: TenantAccounts) -> None:
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._served = accounts.served
        self._weight = accounts.weight
        self._lines: dict[int, dict[bytes, _Line[EntryT]]] = {}  # by priority and tenant; none is empty
        self._shares: TenantShares[EntryT] = TenantShares(accounts.weight)
        self._num_requests = 0
        self.num_tokens = 0

    def __len__(self) -> int:
        return self._num_requests

    def __contains__(self, entry: EntryT) -> bool:
        line = self._lines.get(entry.priority, {}).get(entry.tenant)
        return line is not None and entry in line

    @property
    def tenants(self) -> Collection[bytes]:
        """The tenants with waiting requests."""
        return self._shares.tenants

    @property
    def num_tenants(self) -> int:
        """Number of tenants with waiting requests."""
        return len(self._shares)

    def in_order(self) -> Iterator[EntryT]:
        """Iterate over the waiting entries in dispatch order. The caller may remove an entry, and charge its tenant,
        before it takes the next one.
        """
        for priority in sorted(self._lines):
            lines = {tenant: line.copy() for tenant, line in self._lines[priority].items()}
            heads = [(self._served(tenant), line[0].arrival, tenant, 0) for tenant, line in lines.items()]
            heapify(heads)
            while heads:
                _, _, tenant, place = heads[0]
                line = lines[tenant]
                yield line[place]
                if place + 1 < len(line):
                    heapreplace(heads, (self._served(tenant), line[place + 1].arrival, tenant, place + 1))
                else:
                    heappop(heads)

    def heads(self) -> list[EntryT]:
        """Return the next entry of each tenant, by priority and then by what the tenant was served."""
        heads = {}
        for priority in sorted(self._lines, reverse=True):
            heads.update({tenant: line.first for tenant, line in self._lines[priority].items()})
        return sorted(heads.values(), key=lambda entry: (entry.priority, self._served(entry.tenant), entry.arrival))

    def firsts(self) -> Iterator[EntryT]:
        """Iterate over the next entry of each tenant and priority, in no order."""
        return (line.first for lines in self._lines.values() for line in lines.values())

    def admit(self, entry: EntryT, remaining: float | None, tokens_per_second: float | None) -> list[EntryT]:
        """Queue a new request, or refuse it at once if it would wait in vain.

        Args:
            entry: The request.
            remaining: Seconds until its deadline; None = no deadline.
            tokens_per_second: Measured rate at which the queue drains; None = not measured, nothing is predicted.

        Returns:
            The requests of other tenants that were taken out to make room: the caller ends them, with `crowded_out`.

        Raises:
            QueueFullError: There is no place for it.
            StatusError: RESOURCE_EXHAUSTED when its prompt is too long for what is left, DEADLINE_EXCEEDED when its
                first token would come too late.
        """
        dropped = self._make_room(entry, tokens_per_second)
        if remaining is not None:
            ahead = self.tokens_ahead(entry)
            predicted = ahead / tokens_per_second if tokens_per_second else 0.0
            if predicted > remaining or remaining <= 0.0:
                raise StatusError(
                    grpc.StatusCode.DEADLINE_EXCEEDED,
                    f"the deadline is in {remaining:.3f} s, and {ahead} prompt tokens wait before this request: "
                    f"its first token is not expected before {predicted:.3f} s",
                )
        self._insert(entry, may_be_dropped=True)
        for other in dropped:
            self.remove(other)
        return dropped

    def crowded_out(self, tokens_per_second: float | None) -> StatusError:
        """Return the error for a request that was dropped to make room for another tenant's."""
        return self._full(
            "the tenant of this request holds most of it and made room for another's", 0, tokens_per_second
        )

    def put_back(self, entry: EntryT) -> None:
        """Queue a request that was admitted before, here or by another scheduler. It is never refused or dropped, and
        as its tenant's requests are ordered by arrival, it gets its old place back.
        """
        self._insert(entry, may_be_dropped=False)

    def remove(self, entry: EntryT) -> None:
        """Remove a request. Raises KeyError if it is not queued."""
        if entry not in self:
            raise KeyError(f"request {entry.arrival} is not queued")
        lines = self._lines[entry.priority]
        lines[entry.tenant].remove(entry)
        if not lines[entry.tenant].num_tokens:
            del lines[entry.tenant]
            if not lines:
                del self._lines[entry.priority]
        self._shares.remove(entry)
        self._num_requests -= 1
        self.num_tokens -= entry.num_prompt_tokens

    def tokens_ahead(self, entry: EntryT) -> int:
        """Estimate the prompt tokens that are dispatched before a request that arrives now, if each other tenant is
        served as many as its own, in proportion to their weights.
        """
        ahead = 0
        for priority, lines in self._lines.items():
            if priority < entry.priority:
                ahead += sum(line.num_tokens for line in lines.values())
        lines = self._lines.get(entry.priority, {})
        own = lines[entry.tenant].num_tokens if entry.tenant in lines else 0
        share = (own + entry.num_prompt_tokens) / self._weight(entry.tenant)
        others = ((tenant, line.num_tokens) for tenant, line in lines.items() if tenant != entry.tenant)
        return ahead + own + sum(min(int(share * self._weight(tenant)), tokens) for tenant, tokens in others)

    def _insert(self, entry: EntryT, *, may_be_dropped: bool) -> None:
        self._lines.setdefault(entry.priority, {}).setdefault(entry.tenant, _Line()).insert(entry)
        self._shares.add(entry, may_be_dropped=may_be_dropped)
        self._num_requests += 1
        self.num_tokens += entry.num_prompt_tokens

    def _make_room(self, entry: EntryT, tokens_per_second: float | None) -> list[EntryT]:
        """Choose what has to leave for a new request. Raises StatusError RESOURCE_EXHAUSTED."""
        num_excess = self._num_requests + 1 - self._max_requests
        excess = self.num_tokens + entry.num_prompt_tokens - self._max_tokens if self._num_requests else 0
        if num_excess <= 0 and excess <= 0:
            return []
        try:
            return self._shares.make_room(entry, (num_excess, excess))
        except NoRoomError as error:
            lacks_requests = error.lacks_requests
        if lacks_requests:
            full = self._full(f"{self._max_requests} requests wait", excess, tokens_per_second)
            tenth = self.num_tokens / 10 / tokens_per_second if tokens_per_second else _LONGEST_FULL
            raise QueueFullError(full.message, full.retry_after, min(tenth, _LONGEST_FULL))
        limit = f"{self.num_tokens} prompt tokens wait, and {entry.num_prompt_tokens} more exceed the limit of "
        raise self._full(limit + str(self._max_tokens), excess, tokens_per_second)

    def _full(self, why: str, excess: int, tokens_per_second: float | None) -> StatusError:
        retry_after = _RETRY_AFTER_UNKNOWN
        if tokens_per_second:
            # Until there is room for this request and for some of the others that were sent away as well.
            shortest, longest = _RETRY_AFTER_RANGE
            retry_after = min(max(max(excess, self.num_tokens / 10) / tokens_per_second, shortest), longest)
        return StatusError(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            f"the admission queue is full: {why}",
            retry_after=retry_after,
        )


class _Line(Generic[EntryT]):
    """The requests of one tenant and priority, by arrival."""

    def __init__(self) -> None:
        self._entries: list[EntryT] = []
        self.num_tokens = 0

    def __contains__(self, entry: EntryT) -> bool:
        place = bisect_left(self._entries, entry.arrival, key=_arrival)
        return place < len(self._entries) and self._entries[place] is entry

    @property
    def first(self) -> EntryT:
        return self._entries[0]

    def copy(self) -> list[EntryT]:
        return self._entries.copy()

    def insert(self, entry: EntryT) -> None:
        insort(self._entries, entry, key=_arrival)
        self.num_tokens += entry.num_prompt_tokens

    def remove(self, entry: EntryT) -> None:
        del self._entries[bisect_left(self._entries, entry.arrival, key=_arrival)]
        self.num_tokens -= entry.num_prompt_tokens


def _arrival(entry: QueueEntry) -> int:
    return entry.arrival
