"""Waiting of requests while no executor is ready."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable


class Outage:
    """Decides how long requests wait while no executor is ready.

    While an executor's front answers (its engine loads a model, or it drains), requests wait for up to `restart_limit`
    seconds. While none answers they wait for `grace` seconds, the time that a supervisor takes to restart one. After
    that the wait is given up, and requests are refused until an executor is ready.

    Args:
        grace: Seconds without a front that answers.
        restart_limit: Seconds without a ready executor while a front answers. Never less than `grace`.
        on_given_up: Called when the wait is given up.

    Attributes:
        is_given_up: True while requests are refused.
        turned_away_at: Time at which a request was last refused, in seconds of the event loop's clock.
    """

    def __init__(self, grace: float, restart_limit: float, on_given_up: Callable[[], None]) -> None:
        self.is_given_up = False
        self.turned_away_at = -math.inf
        self._grace = grace
        self._restart_limit = max(grace, restart_limit)
        self._on_given_up = on_given_up
        self._loop = asyncio.get_running_loop()
        self._since: float | None = None
        self._unreachable_since: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._decided = asyncio.Event()

    def update(self, *, is_ready: bool, is_reachable: bool) -> None:
        """Update the state of the executors, and start or stop the timer of the outage.

        Args:
            is_ready: True if an executor takes requests.
            is_reachable: True if an executor answers and is expected to take requests soon.
        """
        self._stop_timer()
        if is_ready:
            self._since = self._unreachable_since = None
            self.is_given_up = False
            self._decided.set()
            return
        now = self._loop.time()
        if self._since is None:
            self._since = now
            self._decided.clear()
        if is_reachable:
            self._unreachable_since = None
        elif self._unreachable_since is None:
            self._unreachable_since = now
        if not self.is_given_up:
            limit = self._since + self._restart_limit
            if self._unreachable_since is not None:
                limit = min(limit, self._unreachable_since + self._grace)
            self._timer = self._loop.call_at(limit, self._give_up)

    def turn_away(self) -> None:
        """Record, for scaling, that a request is refused."""
        self.turned_away_at = self._loop.time()

    async def wait_decided(self, timeout: float) -> None:
        """Wait until an executor is ready or the wait for one is given up, no longer than `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout):
                await self._decided.wait()
        except TimeoutError:
            pass

    def stop(self) -> None:
        """Stop the timer."""
        self._stop_timer()

    def _give_up(self) -> None:
        self.is_given_up = True
        self._decided.set()
        self._on_given_up()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
