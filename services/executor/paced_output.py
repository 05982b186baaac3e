"""The results of steps on their way to the links: sent at once, or those of a few short steps together."""

from __future__ import annotations

from collections.abc import Mapping

from scalellm.services.executor.engine import LinkResult


class PacedOutput:
    """Holds tokens back until the last results are `interval` old, so that the tokens of short steps are sent together.

    A frame costs about a millisecond of CPU time in the services and the client, whatever the number of its tokens, and
    on a CPU they compute on the cores on which the engine computes.

    What a client waits for is never held back: first tokens and ends are sent at once, with what was held.

    Args:
        interval: Seconds; 0 = everything is sent at once.
    """

    def __init__(self, interval: float) -> None:
        self._interval = interval
        self._held: dict[int, LinkResult] = {}
        self._last = float("-inf")

    def add(self, results: Mapping[int, LinkResult], now: float) -> Mapping[int, LinkResult]:
        """Add the results of a step, by link.

        Args:
            results: The results; not changed after this by the caller.
            now: Time at which the step ended, in seconds.

        Returns:
            The results that are to be sent now, by link. Empty: they are held, or there are none.
        """
        for link, result in results.items():
            if (held := self._held.get(link)) is None:
                self._held[link] = result
            else:
                held.extend(result)
        is_due = now - self._last >= self._interval or any(result.is_urgent for result in results.values())
        return self.take(now) if is_due else {}

    def take(self, now: float) -> Mapping[int, LinkResult]:
        """Return the results that were held, which are to be sent now, by link."""
        held, self._held = self._held, {}
        if held:
            self._last = now
        return held
