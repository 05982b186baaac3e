"""Closed-loop clients of either protocol: as many calls at once as they were told, counted, until they stop."""

from __future__ import annotations

from typing import Any, Generic, Protocol, TypeVar

from bench.services.neighbours.tally import Tally


class Closable(Protocol):
    """A connection."""

    def close(self) -> None:
        """Drop it, with all that runs on it."""


ConnectionT = TypeVar("ConnectionT", bound=Closable)


class ClosedLoop(Generic[ConnectionT]):
    """Keeps calls open: each that ends is followed by another one.

    Args:
        address: host:port of the tokenizer service, for the protocol that is spoken.
        stamped: True if tokens say when they were sent: the scheduler is simulated.

    Attributes:
        tally: Counts and times.
        connections: Those that are open.
        is_running: False before the start and after the stop: what ends then is no error.
    """

    def __init__(self, address: str, stamped: bool) -> None:
        self.address = address
        self.stamped = stamped
        self.tally = Tally()
        self.connections: list[ConnectionT] = []
        self.is_running = False
        self._number = 0

    def next_number(self) -> int:
        """Number of the next request, from 1 on."""
        self._number += 1
        return self._number

    def take(self) -> dict[str, Any]:
        """Counts since the last call."""
        return self.tally.take()

    async def stop(self) -> None:
        """Drop all connections, and with them all calls."""
        self.is_running = False
        for connection in self.connections:
            connection.close()
        self.connections = []
