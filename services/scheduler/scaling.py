"""The load of the pools of executors, and the wanted number of executors of each, computed every second."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from scalellm.services.common.addresses import is_ip_address, split_address
from scalellm.services.scheduler.scaling_rule import PoolDemand, ScalingRule

if TYPE_CHECKING:
    from scalellm.services.scheduler.dispatcher import Dispatcher
    from scalellm.services.scheduler.dispatchers import Dispatchers
    from scalellm.services.scheduler.placement import Placement
    from scalellm.services.scheduler.replica_link import ReplicaLink

ALL = ""
"""Name of the pool of all executors."""

_LOOK_S = 1.0

_REMEMBERED_S = 60.0
"""Seconds for which a request that found no executor counts as demand for one. Clients retry in less time."""


@dataclass(frozen=True, slots=True)
class PoolState:
    """State of a pool at the last observation.

    Attributes:
        ready: Executors that take requests.
        saturation: Share of their rows or cache, whichever is more, that all running and waiting requests would take;
            above 1 they do not fit. With no executor ready, it is relative to the size of one.
        oldest_s: Seconds that the oldest request has waited; 0 = none waits.
        wanted: Number of executors that the pool should have.
        is_active: False while no executor is needed at all.
    """

    ready: int = 0
    saturation: float = 0.0
    oldest_s: float = 0.0
    wanted: int = 0
    is_active: bool = False


class Scaling:
    """Observes all pools every second. A pool is the set of executors that one listed name resolves to, or all
    executors.

    Waiting requests belong to no pool until they are dispatched, so they count in full for each pool of their model.
    Requests that other schedulers sent to an executor are known from its load reports; those that wait in other
    schedulers are not known.

    Args:
        dispatchers: The executors of each model, and what waits for them.
        names: The addresses that each listed name stands for now.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        dispatchers: Dispatchers,
        names: Callable[[], Mapping[str, frozenset[str]]],
        clock: Callable[[], float],
    ) -> None:
        self._dispatchers = dispatchers
        self._names = names
        self._clock = clock
        self._pools: dict[str, _Pool] = {ALL: _Pool()}
        self._looked = asyncio.Event()

    async def run(self) -> None:
        """Observe the pools every second until cancelled."""
        while True:
            self.look()
            await asyncio.sleep(_LOOK_S)

    def look(self) -> None:
        """Observe all pools once."""
        now = self._clock()
        # Plain IP addresses are left out: such an address is always one executor, so there is nothing to scale.
        named = {
            name: addresses for name, addresses in self._names().items() if not is_ip_address(split_address(name)[0])
        }
        self._pools = {name: self._pools.get(name) or _Pool() for name in (ALL, *named)}
        for name, pool in self._pools.items():
            pool.look([_Part.of(each, named.get(name)) for each in self._models_of(named.get(name))], now)
        looked, self._looked = self._looked, asyncio.Event()
        looked.set()

    def _models_of(self, addresses: frozenset[str] | None) -> list[Dispatcher]:
        """Return the dispatchers of the executors at these addresses (None: all), or the first one if none is known."""
        first, *others = self._dispatchers
        if addresses is None:
            return [first, *others]
        return [each for each in (first, *others) if not addresses.isdisjoint(each.fleet.replicas)] or [first]

    @property
    def states(self) -> Mapping[str, PoolState]:
        """States of all pools, by name."""
        return {name: pool.state for name, pool in self._pools.items()}

    async def next_look(self) -> None:
        """Wait until the pools have been observed again."""
        await self._looked.wait()


@dataclass(frozen=True, slots=True)
class _Part:
    """The executors of one model in a pool, and their placement."""

    ready: list[ReplicaLink]
    placement: Placement

    @classmethod
    def of(cls, dispatcher: Dispatcher, addresses: frozenset[str] | None) -> _Part:
        ready = dispatcher.fleet.ready
        members = ready.values() if addresses is None else (ready[one] for one in addresses if one in ready)
        return cls(list(members), dispatcher.placement)

    @property
    def is_wanted_at(self) -> float:
        """Time at which a request last needed an executor, in seconds of the event loop; infinite while any is open."""
        return math.inf if self.placement.books.num_open else self.placement.outages.of_all.turned_away_at

    def oldest(self, now: float) -> float:
        """Return the seconds that the oldest queued request has waited; 0 if none waits."""
        return max((now - since for since in _waiting_since(self.placement)), default=0.0)


class _Pool:
    """State of one pool that is kept between observations."""

    def __init__(self) -> None:
        self.state = PoolState()
        self._rule = ScalingRule()
        self._rows = self._tokens = math.inf  # mean per executor, of those that were last ready

    def look(self, parts: Sequence[_Part], now: float) -> None:
        ready = [replica for part in parts for replica in part.ready]
        if ready:
            self._rows = max(1.0, sum(replica.max_num_seqs for replica in ready) / len(ready))
            self._tokens = max(1.0, sum(replica.cache_tokens for replica in ready) / len(ready))
        queues = [part.placement.queue for part in parts]
        waiting = sum(max(len(queue) / self._rows, queue.num_tokens / self._tokens) for queue in queues)
        work = sum(map(_share_in_use, ready)) + waiting
        waits = [part.oldest(now) for part in parts]
        is_wanted = any(now - part.is_wanted_at < _REMEMBERED_S for part in parts)
        full = (wait for part, wait in zip(parts, waits, strict=True) if not any(one.has_credit for one in part.ready))
        stuck = max(full, default=0.0)
        wanted = self._rule.update(PoolDemand(len(ready), work, stuck, is_wanted), now)
        self.state = PoolState(len(ready), work / max(1, len(ready)), max(waits), wanted, is_active=wanted > 0)


def _share_in_use(replica: ReplicaLink) -> float:
    """Return the used share of an executor's rows or cache, whichever is more; above 1 if requests wait there."""
    rows = replica.num_requests / max(1, replica.max_num_seqs)
    cache = 1.0 - replica.load.free_blocks / replica.load.total_blocks if replica.load.total_blocks else 0.0
    return max(rows, cache)


def _waiting_since(placement: Placement) -> Iterator[float]:
    """Iterate over the times since which the first request of each tenant and priority has waited. The oldest request
    is among these, or hardly older than the oldest of them.
    """
    return (request.times.waits_since for request in placement.queue.firsts())
