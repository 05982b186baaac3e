"""Requests that wait for an executor: bounded, by priority, aware of deadlines."""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import Generic, Protocol, TypeVar

import grpc

from services.common.errors import StatusError

_RETRY_AFTER_UNKNOWN = 1.0
_RETRY_AFTER_RANGE = (0.1, 60.0)


class QueueEntry(Protocol):
    """What the queue must know of a request."""

    @property
    def priority(self) -> int:
        """Lower leaves first."""

    @property
    def arrival(self) -> int:
        """Unique and rising; among equal priorities, lower leaves first."""

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens to prefill."""


EntryT = TypeVar("EntryT", bound=QueueEntry)


class AdmissionQueue(Generic[EntryT]):
    """Waiting requests in the order in which they shall leave.

    A sorted list: with a few thousand entries an insertion or removal moves some kilobytes, which is cheaper than what
    any tree does in Python, and the order can be walked without disturbing it.

    Args:
        max_requests: Most requests.
        max_tokens: Most prompt tokens. One request that is larger may still wait alone.
    """

    def __init__(self, max_requests: int, max_tokens: int) -> None:
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._entries: list[tuple[int, int, EntryT]] = []
        self._tokens_by_priority: dict[int, int] = {}
        self.num_tokens = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, entry: EntryT) -> bool:
        place = self._place(entry)
        return place < len(self._entries) and self._entries[place][2] is entry

    def in_order(self) -> list[EntryT]:
        """All entries, the next one first; a copy."""
        return [entry for _, _, entry in self._entries]

    def admit(self, entry: EntryT, remaining: float | None, tokens_per_second: float | None) -> None:
        """Take a new request, or refuse it at once rather than let it wait in vain.

        Args:
            entry: The request.
            remaining: Seconds until its deadline; None = no deadline.
            tokens_per_second: Measured rate at which the queue drains; None = not measured, nothing is predicted.

        Raises:
            StatusError: RESOURCE_EXHAUSTED when full, DEADLINE_EXCEEDED when its first token would come too late.
        """
        self._check_room(entry, tokens_per_second)
        if remaining is not None:
            ahead = self.tokens_ahead(entry.priority)
            predicted = ahead / tokens_per_second if tokens_per_second else 0.0
            if predicted > remaining or remaining <= 0.0:
                raise StatusError(
                    grpc.StatusCode.DEADLINE_EXCEEDED,
                    f"the deadline is in {remaining:.3f} s, and {ahead} prompt tokens wait before this request: "
                    f"its first token is not expected before {predicted:.3f} s",
                )
        self.put_back(entry)

    def put_back(self, entry: EntryT) -> None:
        """Return a request that had left. It takes its old place; it was admitted once and is not refused now."""
        insort(self._entries, (entry.priority, entry.arrival, entry))
        self._count(entry, entry.num_prompt_tokens)

    def remove(self, entry: EntryT) -> None:
        """Take a request out."""
        place = self._place(entry)
        if place == len(self._entries) or self._entries[place][2] is not entry:
            raise KeyError(f"request {entry.arrival} is not queued")
        del self._entries[place]
        self._count(entry, -entry.num_prompt_tokens)

    def tokens_ahead(self, priority: int) -> int:
        """Prompt tokens that leave before a request of this priority that comes now."""
        return sum(tokens for other, tokens in self._tokens_by_priority.items() if other <= priority)

    def _place(self, entry: EntryT) -> int:
        # A pair sorts before the triple it begins, and arrivals are unique: entries themselves are never compared.
        return bisect_left(self._entries, (entry.priority, entry.arrival))

    def _count(self, entry: EntryT, tokens: int) -> None:
        self.num_tokens += tokens
        total = self._tokens_by_priority.get(entry.priority, 0) + tokens
        if total:
            self._tokens_by_priority[entry.priority] = total
        else:
            self._tokens_by_priority.pop(entry.priority, None)

    def _check_room(self, entry: EntryT, tokens_per_second: float | None) -> None:
        excess = self.num_tokens + entry.num_prompt_tokens - self._max_tokens
        if len(self._entries) >= self._max_requests:
            limit = f"{self._max_requests} requests wait"
        elif self._entries and excess > 0:
            limit = f"{self.num_tokens} prompt tokens wait, and {entry.num_prompt_tokens} more exceed the limit of "
            limit += str(self._max_tokens)
        else:
            return
        retry_after = _RETRY_AFTER_UNKNOWN
        if tokens_per_second:
            # Until there is room for this request and for some of the others that were sent away as well.
            shortest, longest = _RETRY_AFTER_RANGE
            retry_after = min(max(max(excess, self.num_tokens / 10) / tokens_per_second, shortest), longest)
        raise StatusError(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            f"the admission queue is full: {limit}; retry in {retry_after:.1f} s",
            retry_after=retry_after,
        )
