"""The tenants' shares of a bounded queue, and the choice of requests that make room when it is full."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heapreplace
from typing import Generic, Protocol, TypeVar


class QueueEntry(Protocol):
    """A request as the queue sees it."""

    @property
    def priority(self) -> int:
        """Priority. Lower values leave the queue first."""

    @property
    def tenant(self) -> bytes:
        """The tenant. Among requests of equal priority, those of the tenant served least leave first."""

    @property
    def arrival(self) -> int:
        """Unique rising number. Among requests of one tenant and priority, lower values leave first."""

    @property
    def num_prompt_tokens(self) -> int:
        """Number of prompt tokens."""


EntryT = TypeVar("EntryT", bound=QueueEntry)
_Place = tuple[int, int, EntryT]


@dataclass(slots=True)
class _Holding(Generic[EntryT]):
    """One tenant's part of the queue.

    Attributes:
        amounts: Requests and prompt tokens that wait.
        droppable: The requests that may be dropped, in the order in which they leave the queue.
    """

    amounts: list[int] = field(default_factory=lambda: [0, 0])
    droppable: list[_Place[EntryT]] = field(default_factory=list)

    def count(self, entry: EntryT, sign: int) -> None:
        for resource, amount in enumerate(_amounts(entry)):
            self.amounts[resource] += sign * amount


class NoRoomError(Exception):
    """No room can be made, because too few requests may be dropped.

    Attributes:
        lacks_requests: True if the limit of requests is exceeded; False if only that of prompt tokens is.
    """

    def __init__(self, *, lacks_requests: bool) -> None:
        super().__init__()
        self.lacks_requests = lacks_requests


class TenantShares(Generic[EntryT]):
    """The tenants' shares of a queue.

    Args:
        weight: Returns a tenant's weight.
    """

    def __init__(self, weight: Callable[[bytes], float]) -> None:
        self._weight = weight
        self._holdings: dict[bytes, _Holding[EntryT]] = {}

    def __len__(self) -> int:
        """Return the number of tenants with waiting requests."""
        return len(self._holdings)

    @property
    def tenants(self) -> Collection[bytes]:
        """The tenants with waiting requests."""
        return self._holdings.keys()

    def add(self, entry: EntryT, *, may_be_dropped: bool) -> None:
        """Count a request that was queued."""
        holding = self._holdings.setdefault(entry.tenant, _Holding())
        holding.count(entry, 1)
        if may_be_dropped:
            insort(holding.droppable, _place(entry))

    def remove(self, entry: EntryT) -> None:
        """Remove a request that left the queue."""
        holding = self._holdings[entry.tenant]
        holding.count(entry, -1)
        index = bisect_left(holding.droppable, _place(entry)[:2])
        if index < len(holding.droppable) and holding.droppable[index][2] is entry:
            del holding.droppable[index]
        if not holding.amounts[0]:
            del self._holdings[entry.tenant]

    def make_room(self, entry: EntryT, excess: Sequence[int]) -> list[EntryT]:
        """Choose the requests to drop for a new one; changes nothing.

        Of the tenant that holds most, the request that would leave last is dropped, as long as this tenant afterwards
        still holds at least as much as the new request's tenant will, each relative to its weight. So a tenant that
        holds nothing finds room unless all others of its weight hold a single request, and two tenants never drop each
        other's requests alternately.

        Args:
            entry: The new request.
            excess: Requests and prompt tokens beyond the queue's limits, the new request included.

        Returns:
            The requests to drop.

        Raises:
            NoRoomError: Too few requests may be dropped.
        """
        held = {tenant: list(holding.amounts) for tenant, holding in self._holdings.items()}
        num_left = {tenant: len(holding.droppable) for tenant, holding in self._holdings.items()}
        own = held.pop(entry.tenant, [0, 0])
        weights = {tenant: self._weight(tenant) for tenant in held}
        missing = list(excess)
        dropped: list[EntryT] = []
        for resource, wanted in enumerate(_amounts(entry)):
            share = (own[resource] + wanted) / self._weight(entry.tenant)
            largest = [(-amounts[resource] / weights[tenant], tenant) for tenant, amounts in held.items()]
            heapify(largest)
            while missing[resource] > 0:
                if not largest:
                    raise NoRoomError(lacks_requests=resource == 0)
                _, tenant = largest[0]
                if not num_left[tenant]:
                    heappop(largest)
                    continue
                last = self._holdings[tenant].droppable[num_left[tenant] - 1][2]
                amounts = _amounts(last)
                if (held[tenant][resource] - amounts[resource]) / weights[tenant] < share:
                    heappop(largest)
                    continue
                dropped.append(last)
                num_left[tenant] -= 1
                for index, amount in enumerate(amounts):
                    held[tenant][index] -= amount
                    missing[index] -= amount
                heapreplace(largest, (-held[tenant][resource] / weights[tenant], tenant))
        return dropped


def _amounts(entry: QueueEntry) -> tuple[int, int]:
    return 1, entry.num_prompt_tokens


def _place(entry: EntryT) -> _Place[EntryT]:
    # Arrivals are unique: entries are never compared.
    return entry.priority, entry.arrival, entry
