"""Requests that wait for an executor: bounded, by priority, fair to tenants, aware of deadlines."""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import Generic

import grpc

from services.common.errors import StatusError
from services.scheduler.tenant_shares import EntryT, QueueEntry, TenantShares

_REQUEST_COST = 256
"""What a request takes beside its prompt, in tokens: a place in the batch, however short the prompt is."""

_RETRY_AFTER_UNKNOWN = 1.0
_RETRY_AFTER_RANGE = (0.1, 60.0)


class AdmissionQueue(Generic[EntryT]):
    """Waiting requests in the order in which they shall leave.

    Tenants share alike, by start-time fair queueing (Goyal, Vin and Cheng 1996): a request's turn is where its tenant's
    last one ends, in tokens, and a tenant that was away begins where the queue is now. A tenant alone is served in the
    order of arrival. When the queue is full, the tenant that holds most makes room for those that hold less.

    A sorted list: with a few thousand entries an insertion or removal moves some kilobytes, which is cheaper than what
    any tree does in Python, and the order can be walked without disturbing it.

    Args:
        max_requests: Most requests.
        max_tokens: Most prompt tokens. One request that is larger may still wait alone.
    """

    def __init__(self, max_requests: int, max_tokens: int) -> None:
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._entries: list[tuple[int, int, int, EntryT]] = []
        self._tokens: dict[int, dict[bytes, int]] = {}  # that wait, by priority and tenant
        self._next_turns: dict[int, dict[bytes, int]] = {}  # likewise
        self._newest_turn = 0  # of priorities of which none waits any more
        self._shares: TenantShares[EntryT] = TenantShares()
        self.num_tokens = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, entry: EntryT) -> bool:
        place = self._place(entry)
        return place < len(self._entries) and self._entries[place][3] is entry

    @property
    def num_tenants(self) -> int:
        """Tenants of which requests wait."""
        return len(self._shares)

    def in_order(self) -> list[EntryT]:
        """All entries, the next one first; a copy."""
        return [entry for _, _, _, entry in self._entries]

    def admit(self, entry: EntryT, remaining: float | None, tokens_per_second: float | None) -> list[EntryT]:
        """Take a new request, or refuse it at once rather than let it wait in vain.

        Args:
            entry: The request.
            remaining: Seconds until its deadline; None = no deadline.
            tokens_per_second: Measured rate at which the queue drains; None = not measured, nothing is predicted.

        Returns:
            The requests of other tenants that were taken out to make room: the caller ends them, with `crowded_out`.

        Raises:
            StatusError: RESOURCE_EXHAUSTED when full, DEADLINE_EXCEEDED when its first token would come too late.
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
        own_turn = self._next_turns.get(entry.priority, {}).get(entry.tenant, 0)
        entry.turn = max(own_turn, self._present_turn(entry.priority))
        self._insert(entry, may_be_dropped=True)
        for other in dropped:
            self._next_turns[other.priority][other.tenant] -= _cost(other)  # of what it is not given
            self.remove(other)
        return dropped

    def crowded_out(self, tokens_per_second: float | None) -> StatusError:
        """The refusal of a request that made room for another tenant's."""
        return self._full(
            "the tenant of this request holds most of it and made room for another's", 0, tokens_per_second
        )

    def take_over(self, entry: EntryT) -> None:
        """Take a request that another scheduler had admitted: it is next, and is not refused or dropped any more."""
        entry.turn = self._present_turn(entry.priority)
        self._insert(entry, may_be_dropped=False)

    def put_back(self, entry: EntryT) -> None:
        """Return a request that had left. It takes its old place; it was admitted once, and is not refused or dropped
        now.
        """
        self._insert(entry, may_be_dropped=False)

    def remove(self, entry: EntryT) -> None:
        """Take a request out."""
        place = self._place(entry)
        if place == len(self._entries) or self._entries[place][3] is not entry:
            raise KeyError(f"request {entry.arrival} is not queued")
        del self._entries[place]
        self._shares.remove(entry)
        self._count(entry, -entry.num_prompt_tokens)

    def tokens_ahead(self, entry: EntryT) -> int:
        """Prompt tokens that leave before a request that comes now, about: other tenants get as much as its own."""
        ahead = sum(sum(tenants.values()) for other, tenants in self._tokens.items() if other < entry.priority)
        tenants = self._tokens.get(entry.priority, {})
        own = tenants.get(entry.tenant, 0)
        share = own + entry.num_prompt_tokens
        return ahead + own + sum(min(share, tokens) for other, tokens in tenants.items() if other != entry.tenant)

    def _insert(self, entry: EntryT, *, may_be_dropped: bool) -> None:
        insort(self._entries, (entry.priority, entry.turn, entry.arrival, entry))
        next_turns = self._next_turns.setdefault(entry.priority, {})
        next_turns[entry.tenant] = max(next_turns.get(entry.tenant, 0), entry.turn + _cost(entry))
        self._shares.add(entry, may_be_dropped=may_be_dropped)
        self._count(entry, entry.num_prompt_tokens)

    def _place(self, entry: EntryT) -> int:
        # Shorter tuples sort before the longer ones they begin, and arrivals are unique: entries are never compared.
        return bisect_left(self._entries, (entry.priority, entry.turn, entry.arrival))

    def _present_turn(self, priority: int) -> int:
        """The turn of the next request of a priority; where none waits, one after all that there were."""
        if priority not in self._tokens:
            return self._newest_turn
        return self._entries[bisect_left(self._entries, (priority,))][1]

    def _count(self, entry: EntryT, tokens: int) -> None:
        self.num_tokens += tokens
        tenants = self._tokens.setdefault(entry.priority, {})
        tenants[entry.tenant] = tenants.get(entry.tenant, 0) + tokens
        if not tenants[entry.tenant]:
            del tenants[entry.tenant]
            if not tenants:
                del self._tokens[entry.priority]
                # Nobody is owed anything, and what comes back is still before what is new.
                self._newest_turn = max(self._newest_turn, *self._next_turns.pop(entry.priority, {0: 0}).values())

    def _make_room(self, entry: EntryT, tokens_per_second: float | None) -> list[EntryT]:
        """Choose what has to leave for a new request. Raises StatusError RESOURCE_EXHAUSTED."""
        num_excess = len(self._entries) + 1 - self._max_requests
        excess = self.num_tokens + entry.num_prompt_tokens - self._max_tokens if self._entries else 0
        if num_excess <= 0 and excess <= 0:
            return []
        dropped = self._shares.make_room(entry, (num_excess, excess))
        if dropped is not None:
            return dropped
        if num_excess > 0:
            limit = f"{self._max_requests} requests wait"
        else:
            limit = f"{self.num_tokens} prompt tokens wait, and {entry.num_prompt_tokens} more exceed the limit of "
            limit += str(self._max_tokens)
        raise self._full(limit, excess, tokens_per_second)

    def _full(self, why: str, excess: int, tokens_per_second: float | None) -> StatusError:
        retry_after = _RETRY_AFTER_UNKNOWN
        if tokens_per_second:
            # Until there is room for this request and for some of the others that were sent away as well.
            shortest, longest = _RETRY_AFTER_RANGE
            retry_after = min(max(max(excess, self.num_tokens / 10) / tokens_per_second, shortest), longest)
        return StatusError(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            f"the admission queue is full: {why}; retry in {retry_after:.1f} s",
            retry_after=retry_after,
        )


def _cost(entry: QueueEntry) -> int:
    return entry.num_prompt_tokens + _REQUEST_COST
