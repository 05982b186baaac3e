"""The number of executors that a pool should have. The whole rule is here: nothing else rounds, waits or compares."""

from __future__ import annotations

import math
from dataclasses import dataclass

GROW_AT = 0.8
"""Share of the pool's rows or cache that is in use from which on it grows: what is left covers the start of another."""

SHRINK_TO = 0.6
"""Share that would be in use after shrinking, at most. Load that moves between the two shares changes nothing."""

HOLD = 60.0
"""Seconds for which fewer executors must have been enough before the pool shrinks."""

PATIENCE = 5.0
"""Seconds that a request may wait while no executor takes one; longer, and the pool grows whatever its shares say."""


@dataclass(frozen=True, slots=True)
class PoolDemand:
    """The demand on a pool at one instant.

    Attributes:
        ready: Executors that take requests.
        work: Number of executors that all running and waiting requests would fill, in fractions.
        stuck_s: Seconds that the oldest request has waited while no executor takes one; 0 = none waits.
        is_wanted: True if a request runs, waits, or was lately turned away because there was no executor.
    """

    ready: int
    work: float
    stuck_s: float
    is_wanted: bool


class ScalingRule:
    """The number of executors that a pool should have, from one look to the next.

    It rises at once, so that requests wait no longer than an executor takes to start. It falls when fewer would have
    been enough at every look for `HOLD` seconds, and then to the most that any of these looks asked for. A load that
    goes up and down faster than that, or between the two shares, therefore changes nothing.
    """

    def __init__(self) -> None:
        self.wanted = 0
        self._enough_since: float | None = None  # since when fewer have been enough
        self._most = 0  # that a look asked for since then

    def update(self, demand: PoolDemand, now: float) -> int:
        """Take over one look at the pool, and return the number.

        Args:
            demand: The observed demand.
            now: Monotonic seconds; never less than at the last look.
        """
        least, enough = _executors(demand, GROW_AT), _executors(demand, SHRINK_TO)
        if least > self.wanted:
            self.wanted = least
        if enough >= self.wanted:
            self._enough_since = None
        elif self._enough_since is None:
            self._enough_since, self._most = now, enough
        else:
            self._most = max(self._most, enough)
            if now - self._enough_since >= HOLD:
                self.wanted, self._enough_since = self._most, None
        return self.wanted


def _executors(demand: PoolDemand, share: float) -> int:
    """Executors of which this share would be in use."""
    # Slightly less: a sum of fractions that stands for a whole number may be rounded above it.
    count = math.ceil(demand.work / share - 1e-9)
    if demand.is_wanted:
        count = max(count, 1)
    if demand.stuck_s > PATIENCE:
        count = max(count, demand.ready + 1)
    return count
