"""The load of the pools of executors, and the number of executors that each should have, observed periodically."""

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
"""Seconds for which a request that found no executor counts as wanting one: its client comes back sooner."""


@dataclass(frozen=True, slots=True)
class PoolState:
    """A pool at the last look.

    Attributes:
        ready: Executors that take requests.
        saturation: Share of their rows or cache, whichever is more, that all requests that run or wait would take;
            above 1 they do not fit. With no executor ready, as a share of one.
        oldest_s: Seconds that the oldest request has waited; 0 = none waits.
        wanted: Executors that there should be.
        is_active: False while no executor is needed at all.
    """

    ready: int = 0
    saturation: float = 0.0
    oldest_s: float = 0.0
    wanted: int = 0
    is_active: bool = False


class Scaling:
    """Looks at all pools every second. A pool is what one name of executors stands for, or all executors.

    Requests that wait are not given to a pool before an executor takes them: they count in full for each pool of their
    model. Of what other schedulers sent to an executor, its reports tell; what waits in them is known to them alone.

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
        """Look until cancelled."""
        while True:
            self.look()
            await asyncio.sleep(_LOOK_S)

    def look(self) -> None:
        """Bring all pools up to date."""
        now = self._clock()
        # An address is one executor for ever: nobody scales it.
        named = {
            name: addresses for name, addresses in self._names().items() if not is_ip_address(split_address(name)[0])
        }
        self._pools = {name: self._pools.get(name) or _Pool() for name in (ALL, *named)}
        for name, pool in self._pools.items():
            pool.look([_Part.of(each, named.get(name)) for each in self._models_of(named.get(name))], now)
        looked, self._looked = self._looked, asyncio.Event()
        looked.set()

    def _models_of(self, addresses: frozenset[str] | None) -> list[Dispatcher]:
        """The models that executors at these addresses have; None: at any. The first, where that is not known."""
        first, *others = self._dispatchers
        if addresses is None:
            return [first, *others]
        return [each for each in (first, *others) if not addresses.isdisjoint(each.fleet.replicas)] or [first]

    @property
    def states(self) -> Mapping[str, PoolState]:
        """All pools by name."""
        return {name: pool.state for name, pool in self._pools.items()}

    async def next_look(self) -> None:
        """Wait until the pools were looked at again."""
        await self._looked.wait()


@dataclass(frozen=True, slots=True)
class _Part:
    """The part of a pool that is of one model."""

    ready: list[ReplicaLink]
    placement: Placement

    @classmethod
    def of(cls, dispatcher: Dispatcher, addresses: frozenset[str] | None) -> _Part:
        ready = dispatcher.fleet.ready
        members = ready.values() if addresses is None else (ready[one] for one in addresses if one in ready)
        return cls(list(members), dispatcher.placement)

    @property
    def is_wanted_at(self) -> float:
        """Time at which an executor was wanted last; infinite while one is."""
        return math.inf if self.placement.books.num_open else self.placement.outage.turned_away_at

    def oldest(self, now: float) -> float:
        """Seconds that its oldest request has waited."""
        return max((now - since for since in _waiting_since(self.placement)), default=0.0)


class _Pool:
    """One pool, from look to look."""

    def __init__(self) -> None:
        self.state = PoolState()
        self._rule = ScalingRule()
        self._rows = self._tokens = math.inf  # of one executor; those of the last that were ready

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
    """Used share of an executor's rows or of its cache, whichever is more; above 1 where requests wait there."""
    rows = replica.num_requests / max(1, replica.max_num_seqs)
    cache = 1.0 - replica.load.free_blocks / replica.load.total_blocks if replica.load.total_blocks else 0.0
    return max(rows, cache)


def _waiting_since(placement: Placement) -> Iterator[float]:
    """Since when the next requests of each tenant and priority wait: the oldest is among them, or hardly younger."""
    return (request.times.waits_since for request in placement.queue.firsts())
