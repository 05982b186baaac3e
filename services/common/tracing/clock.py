"""From monotonic time, which services measure with, to the wall clock, which spans are dated with."""

from __future__ import annotations

import time
from collections.abc import Callable

_TRIES = 5
_STEP_NS = 1_000_000


class WallClock:
    """Dates monotonic times.

    On one host all processes arrive at the same dates: adjusting the clock's rate moves both clocks alike, so their
    distance changes only when the wall clock is set. Between hosts dates differ as much as their wall clocks do.

    Args:
        wall: Unix time in nanoseconds.
        monotonic: Monotonic nanoseconds.
    """

    def __init__(
        self, wall: Callable[[], int] = time.time_ns, monotonic: Callable[[], int] = time.monotonic_ns
    ) -> None:
        self._wall = wall
        self._monotonic = monotonic
        self._offset = self._measure()

    def offset(self) -> int:
        """Nanoseconds to add to a monotonic time now. Looked up once per request, so that its spans stay together."""
        if abs(self._wall() - self._monotonic() - self._offset) > _STEP_NS:  # it was set, or we were interrupted here
            self._offset = self._measure()
        return self._offset

    def _measure(self) -> int:
        """The distance between the clocks, from the attempt that was least interrupted."""
        best, narrowest = 0, 0
        for attempt in range(_TRIES):
            before = self._monotonic()
            wall = self._wall()
            after = self._monotonic()
            if attempt == 0 or after - before < narrowest:
                best, narrowest = wall - (before + after) // 2, after - before
        return best
