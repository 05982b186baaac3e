"""Discovery of schedulers: listed addresses and names, which are looked up periodically."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

from scalellm.services.common.addresses import split_address
from scalellm.services.common.name_lookup import NameLookup


class SchedulerSet(Protocol):
    """The receiver of discovered schedulers."""

    def add(self, address: str, host: str) -> None:
        """Add the scheduler at an address; `host` is the name under which it is listed. Idempotent."""

    def drop_when_down(self, address: str) -> None:
        """Forget a scheduler once its link is down, since its name no longer resolves to its address."""


class SchedulerDiscovery:
    """Turns the listed names into addresses and keeps them up to date; see `look_up`.

    A failing look-up changes nothing, because name servers fail more often than schedulers move.

    Args:
        names: host:port of each.
        schedulers: Receives additions and removals.
        interval: Seconds between look-ups.

    Attributes:
        errors: Errors of names that cannot be looked up.
    """

    def __init__(self, names: Sequence[str], schedulers: SchedulerSet, interval: float) -> None:
        self._names: dict[str, frozenset[str]] = dict.fromkeys(names, frozenset())
        self._schedulers = schedulers
        self._interval = interval
        self._lookup = NameLookup("scheduler")
        self.errors = self._lookup.errors

    async def run(self) -> None:
        """Look names up until cancelled."""
        while True:
            for name in self._names:
                await self._resolve(name)
            await asyncio.sleep(self._interval)

    async def _resolve(self, name: str) -> None:
        addresses = await self._lookup.look_up(name)
        if addresses is None:
            return
        before, self._names[name] = self._names[name], addresses
        host, _ = split_address(name)
        for address in sorted(addresses):
            self._schedulers.add(address, host)
        known = frozenset[str]().union(*self._names.values())
        for address in before - known:
            self._schedulers.drop_when_down(address)
