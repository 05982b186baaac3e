"""Decides when the results of steps are sent to the links: at once, or those of a few short steps together."""

from __future__ import annotations

from collections.abc import Mapping

from scalellm.services.executor.engine import LinkResult, StepResult

_LONG_AGO = float("-inf")


class PacedOutput:
    """Holds results back until `interval` has passed since results were last sent, so that the tokens of short steps
    are sent together.

    A frame costs the services and the client about a millisecond of CPU time, whatever the number of its tokens, and
    beside an engine on a CPU they have to take that from the engine's cores.

    First tokens and ends are not held back: they are sent at once, with all results that were held.

    Args:
        interval: Seconds; 0 = all results are sent at once.
    """

    def __init__(self, interval: float) -> None:
        self._interval = interval
        self._held: dict[int, LinkResult] = {}
        self._last = _LONG_AGO

    def add(self, result: StepResult, now: float) -> Mapping[int, LinkResult]:
        """Add the results of a step.

        Args:
            result: The results; not changed after this by the caller.
            now: Time at which the step ended, in seconds.

        Returns:
            The results to send now, by link. Empty: they are held, or there are none.
        """
        for link, part in result.links.items():
            if (held := self._held.get(link)) is None:
                self._held[link] = part
            else:
                held.extend(part)
        is_urgent = result.has_first or result.has_ends
        if not is_urgent and now - self._last < self._interval:
            return {}
        return self.take(now)

    def take(self, now: float = _LONG_AGO) -> Mapping[int, LinkResult]:
        """Return the held results, by link, to send them at the time `now`. Without a time, the next results are not
        held back because of these.
        """
        held, self._held = self._held, {}
        if held or now == _LONG_AGO:
            self._last = now
        return held
