"""Conversion of monotonic time, which services measure, to wall-clock time, which spans need."""

from __future__ import annotations

import time
from collections.abc import Callable

_TRIES = 5
_STEP_NS = 1_000_000


class WallClock:
    """Converts monotonic times to Unix times.

    All processes of a host get the same results, because an adjustment of the clock's rate changes both clocks equally,
    so that their distance changes only when the wall clock is set. Between hosts, results differ as the wall clocks do.

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
        """Return the nanoseconds to add to a monotonic time. Called once per request, so that its spans are
        consistent.
        """
        # the clock was set, or this thread was interrupted between the two calls
        if abs(self._wall() - self._monotonic() - self._offset) > _STEP_NS:
            self._offset = self._measure()
        return self._offset

    def _measure(self) -> int:
        """Return the distance of the clocks, from the attempt with the shortest interruption."""
        best, narrowest = 0, 0
        for attempt in range(_TRIES):
            before = self._monotonic()
            wall = self._wall()
            after = self._monotonic()
            if attempt == 0 or after - before < narrowest:
                best, narrowest = wall - (before + after) // 2, after - before
        return best
