"""A short-lived cache of the schedulers' refusals for want of room in the queue, by tenant."""

from __future__ import annotations

from collections import deque

from scalellm.services.common.errors import StatusError
from scalellm.v1 import link_pb2

_LONGEST_WAIT = 60 * 10**9
"""Longest time until a retry that a caller is asked to wait, in nanoseconds."""

_RETURNS_PER_END = 2
"""Refused callers that are asked to retry per request that ends. More than one, because some will not retry and the
queue must not run empty."""

_NUM_ENDS = 32
"""Number of a tenant's last requests over whose ends their rate is measured."""


class FullQueues:
    """Refuses requests that the schedulers would refuse, by their recent refusals, and spreads the callers' retries.

    The scheduler alone decides which tenant has no room, and for how long. A refusal says nothing about other tenants
    or other schedulers.
    """

    def __init__(self) -> None:
        self._full: dict[bytes, dict[str, tuple[int, link_pb2.LinkStatus]]] = {}
        self._returns: dict[bytes, _Returns] = {}

    def note(self, tenant: bytes, scheduler: str, finish: link_pb2.Finish, now: int) -> None:
        """Handle the Finish of a request. If it is a refusal for want of room, remember it and set its time to retry.

        Args:
            tenant: Tenant of the request, as in its Submit.
            scheduler: The scheduler's address.
            finish: The scheduler's Finish; its time to retry is changed.
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
        """Count the end of a request that a scheduler had accepted, for the rate of retries."""
        if (returns := self._returns.get(tenant)) is not None:
            if returns.is_over(now):
                del self._returns[tenant]
            else:
                returns.ends.append(now)

    def forget(self, scheduler: str) -> None:
        """Forget the refusals of a scheduler that was lost, because its successor has a queue of its own."""
        for full in self._full.values():
            full.pop(scheduler, None)

    def check_room(self, tenant: bytes, schedulers: list[str], now: int) -> None:
        """Raise StatusError RESOURCE_EXHAUSTED for a tenant's new request if each of the schedulers would refuse it."""
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
    """Assigns the refused callers of one tenant their times to retry.

    The times follow one another at twice the rate at which the tenant's requests end. So, whatever the number of
    callers, about as many are refused again per second as are served.

    Attributes:
        ends: Times at which its last requests ended, in monotonic nanoseconds.
    """

    __slots__ = ("_last", "_refused_at", "ends")

    def __init__(self) -> None:
        self.ends: deque[int] = deque(maxlen=_NUM_ENDS)
        self._last = 0
        self._refused_at = 0

    def is_over(self, now: int) -> bool:
        """True once no caller was refused for the longest time that a caller may have been asked to wait."""
        return now - self._refused_at > _LONGEST_WAIT

    def next(self, now: int, soonest: int) -> int:
        """Return the nanoseconds that the next caller shall wait, at least `soonest`."""
        self._refused_at = now
        # Until two requests have ended, which may take long, all callers get the same time.
        gap = (now - self.ends[0]) // (len(self.ends) * _RETURNS_PER_END) if len(self.ends) > 1 else 0
        self._last = max(self._last + gap, now + soonest)
        if self._last - now > _LONGEST_WAIT:
            self._last = now + soonest  # too many for distinct times, so these share the times of earlier callers
        return self._last - now
