"""Discovery of executors: listed addresses and names, looked up again and again."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from typing import Protocol

from scalellm.services.common.addresses import split_address
from scalellm.services.common.name_lookup import NameLookup


class ExecutorSet(Protocol):
    """The receiver of discovered executors."""

    def add(self, address: str) -> None:
        """Add the executor at an address. Idempotent."""

    def remove(self, address: str) -> None:
        """Remove an executor: it gets no new requests and is forgotten once the running ones have ended."""

    def drop_when_down(self, address: str) -> None:
        """Forget an executor once its link is down, since its name no longer resolves to its address."""


class ExecutorDiscovery:
    """Turns the listed names into addresses and keeps them up to date; see `look_up`.

    A failing look-up changes nothing, because name servers fail more often than executors move.

    Args:
        executors: Receives additions and removals.
        interval: Seconds between look-ups.
    """

    def __init__(self, executors: ExecutorSet, interval: float) -> None:
        self._executors = executors
        self._interval = interval
        self._names: dict[str, frozenset[str]] = {}
        self._removed: set[str] = set()
        self._lookup = NameLookup("executor")
        self.errors = self._lookup.errors

    @property
    def names(self) -> Mapping[str, frozenset[str]]:
        """The listed names, each with the addresses that it stands for."""
        return self._names

    async def add(self, names: Iterable[str]) -> None:
        """List names and look them up once. Raises ValueError for what is not host:port."""
        for name in names:
            split_address(name)
            self._removed -= {name, *self._names.get(name, ())}
            self._names.setdefault(name, frozenset())
            await self._resolve(name)

    def remove(self, address: str) -> bool:
        """Unlist a name, or take one address out of those of a name. False when it is unknown."""
        if address in self._names:
            self.errors.pop(address, None)
            unlisted = self._names.pop(address) - self._known()
            orphans = unlisted - self._removed
            self._removed -= unlisted  # else it would not come back with a name that is listed again
        elif address in self._known() - self._removed:
            self._removed.add(address)
            orphans = frozenset((address,))
        else:
            return False
        for orphan in orphans:
            self._executors.remove(orphan)
        return True

    async def run(self) -> None:
        """Look names up until cancelled."""
        while True:
            await asyncio.sleep(self._interval)
            for name in tuple(self._names):
                await self._resolve(name)

    def _known(self) -> frozenset[str]:
        return frozenset(address for addresses in self._names.values() for address in addresses)

    async def _resolve(self, name: str) -> None:
        addresses = await self._lookup.look_up(name)
        if addresses is None:
            return
        if name not in self._names:  # unlisted meanwhile
            return
        before = self._names[name]
        self._names[name] = addresses
        for address in sorted(addresses - self._removed):
            self._executors.add(address)
        for address in before - self._known():
            self._removed.discard(address)
            self._executors.drop_when_down(address)
