"""The rule for the number of executors that a pool should have: all rounding, delays and thresholds are here."""

from __future__ import annotations

import math
from dataclasses import dataclass

GROW_AT = 0.8
"""Used share of the pool's rows or cache from which on it grows. The rest covers the time until another has started."""

SHRINK_TO = 0.6
"""Most used share that a pool may have after shrinking. A load between the two shares changes nothing."""

HOLD = 60.0
"""Seconds for which fewer executors must have been enough before the pool shrinks."""

PATIENCE = 5.0
"""Seconds that a request may wait while no executor has credit before the pool grows, whatever its used share."""


@dataclass(frozen=True, slots=True)
class PoolDemand:
    """The demand on a pool at one instant.

    Attributes:
        ready: Executors that take requests.
        work: Number of executors that all running and waiting requests would fill; a fraction.
        stuck_s: Seconds that the oldest request has waited while no executor takes one; 0 = none waits.
        is_wanted: True if a request runs, waits, or was lately turned away because there was no executor.
    """

    ready: int
    work: float
    stuck_s: float
    is_wanted: bool


class ScalingRule:
    """Computes the number of executors that a pool should have, from one observation to the next.

    The number rises at once, so that requests wait no longer than an executor takes to start. It falls when fewer
    executors were enough at every observation for `HOLD` seconds, and then to the most that any of these observations
    asked for. A load that varies faster than that, or between the two shares, therefore changes nothing.
    """

    def __init__(self) -> None:
        self.wanted = 0
        self._enough_since: float | None = None  # seconds since which fewer have been enough
        self._most = 0  # most executors that an observation asked for since then

    def update(self, demand: PoolDemand, now: float) -> int:
        """Add one observation of the pool. Returns the wanted number of executors.

        Args:
            demand: The observed demand.
            now: Monotonic seconds; never less than at the last observation.
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
    """Return the number of executors of which this share would be in use."""
    # A sum of fractions that stands for a whole number may be rounded slightly above it, which must not add an
    # executor.
    count = math.ceil(demand.work / share - 1e-9)
    if demand.is_wanted:
        count = max(count, 1)
    if demand.stuck_s > PATIENCE:
        count = max(count, demand.ready + 1)
    return count
