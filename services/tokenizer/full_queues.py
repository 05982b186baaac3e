"""Schedulers' queues that have no room for a tenant, remembered for a moment."""

from __future__ import annotations

from collections import deque

from scalellm.services.common.errors import StatusError
from scalellm.v1 import link_pb2

_LONGEST_WAIT = 60 * 10**9
"""Nanoseconds: the longest time to a retry that a caller is told of."""

_RETURNS_PER_END = 2
"""Refused callers that are to come back for each request that ends: some will not, and the queue shall not run dry."""

_NUM_ENDS = 32
"""Last ends of a tenant's requests by which their rate is measured."""


class FullQueues:
    """Spares schedulers the requests that they have just said they would refuse, and spreads the retries of callers.

    Which tenant has no room, and for how long that holds, is the scheduler's alone to say; nothing is concluded from it
    for other tenants or other schedulers.
    """

    def __init__(self) -> None:
        self._full: dict[bytes, dict[str, tuple[int, link_pb2.LinkStatus]]] = {}
        self._returns: dict[bytes, _Returns] = {}

    def note(self, tenant: bytes, scheduler: str, finish: link_pb2.Finish, now: int) -> None:
        """A scheduler ended a request. If it refused it for want of room, the refusal says when to come back.

        Args:
            tenant: Tenant of the request, as schedulers know it.
            scheduler: The scheduler's address.
            finish: The scheduler's Finish; the time to a retry is changed.
            now: Monotonic nanoseconds.
        """
        if finish.tenant_full_ns:
            status = link_pb2.LinkStatus()
            status.CopyFrom(finish.status)
            self._full.setdefault(tenant, {})[scheduler] = (now + finish.tenant_full_ns, status)
            self._tell_return(tenant, finish.status, now)
        else:
            self.count_end(tenant, now)

    def count_end(self, tenant: bytes, now: int) -> None:
        """A request that a scheduler had taken is over."""
        if (returns := self._returns.get(tenant)) is not None:
            if returns.is_over(now):
                del self._returns[tenant]
            else:
                returns.ends.append(now)

    def forget(self, scheduler: str) -> None:
        """A scheduler was lost: whatever takes its place has a queue of its own."""
        for full in self._full.values():
            full.pop(scheduler, None)

    def check_room(self, tenant: bytes, schedulers: list[str], now: int) -> None:
        """Raise the refusal of a new request of a tenant, where each of the schedulers would refuse it."""
        full = self._full.get(tenant)
        if full is None:
            return
        for scheduler, (until, _) in tuple(full.items()):
            if until <= now:
                del full[scheduler]
        if not full:
            del self._full[tenant]
        elif schedulers and all(scheduler in full for scheduler in schedulers):
            _, first = min((full[scheduler] for scheduler in schedulers), key=lambda entry: entry[0])
            status = link_pb2.LinkStatus()
            status.CopyFrom(first)
            self._tell_return(tenant, status, now)
            raise StatusError.from_link(status)

    def _tell_return(self, tenant: bytes, status: link_pb2.LinkStatus, now: int) -> None:
        returns = self._returns.get(tenant)
        if returns is None:
            self._returns = {other: found for other, found in self._returns.items() if not found.is_over(now)}
            returns = self._returns[tenant] = _Returns()
        status.retry_after_ns = returns.next(now, status.retry_after_ns)


class _Returns:
    """The times at which the refused callers of one tenant are told to come back.

    One after the other, at twice the rate at which the tenant's requests end, and not all of them a second later: so
    however many callers there are, in each second about as many are refused again as are served.

    Attributes:
        ends: Time at which its last requests ended, in monotonic nanoseconds.
    """

    __slots__ = ("_last", "_refused_at", "ends")

    def __init__(self) -> None:
        self.ends: deque[int] = deque(maxlen=_NUM_ENDS)
        self._last = 0
        self._refused_at = 0

    def is_over(self, now: int) -> bool:
        """True once nobody was refused for as long as anybody may have been told to wait."""
        return now - self._refused_at > _LONGEST_WAIT

    def next(self, now: int, soonest: int) -> int:
        """Nanoseconds that the next one shall wait, `soonest` or more."""
        self._refused_at = now
        # Until a few requests have ended, which may take long, all callers are told the same time.
        gap = (now - self.ends[0]) // (len(self.ends) * _RETURNS_PER_END) if len(self.ends) > 1 else 0
        self._last = max(self._last + gap, now + soonest)
        if self._last - now > _LONGEST_WAIT:
            self._last = now + soonest  # more than can be told apart: they share the time with those before
        return self._last - now
