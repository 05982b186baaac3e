"""Waiting of requests while no executor that could run them is ready."""

from __future__ import annotations

import logging
from collections.abc import Callable

from scalellm.services.common.errors import StatusError
from scalellm.services.scheduler.config import SchedulerSettings
from scalellm.services.scheduler.fleet import Fleet
from scalellm.services.scheduler.outage import Outage
from scalellm.services.scheduler.request import Request

_log = logging.getLogger(__name__)


class Outages:
    """The outage of all executors, and that of the executors that take grammars. A request with a grammar waits for one
    of these, though others are ready, as every request waits while none is ready.

    Args:
        settings: Seconds that requests wait.
        fleet: The executors.
        on_given_up: Called when a wait is given up, to end the requests with a `refusal`.

    Attributes:
        of_all: The outage while no executor is ready.
        of_grammars: The outage while no executor that takes grammars is ready.
    """

    def __init__(self, settings: SchedulerSettings, fleet: Fleet, on_given_up: Callable[[], None]) -> None:
        limits = settings.executor_grace_s, settings.engine_restart_limit_s
        self.of_all = Outage(*limits, self._on_all_given_up)
        self.of_grammars = Outage(*limits, self._on_grammars_given_up)
        self._fleet = fleet
        self._on_given_up = on_given_up

    def update(self) -> None:
        """Update the outages after executors changed."""
        fleet = self._fleet
        self.of_all.update(is_ready=bool(fleet.ready), is_reachable=fleet.is_reachable)
        self.of_grammars.update(is_ready=fleet.router.takes_grammars, is_reachable=fleet.may_take_grammars)

    def holds(self, request: Request) -> bool:
        """True if executors are ready, but none that could run a request."""
        return bool(self._fleet.ready) and request.needs_grammars and not self._fleet.router.takes_grammars

    def refusal(self, request: Request) -> StatusError | None:
        """Return the error of a request for whose executors the wait was given up, and record, for scaling, that it is
        refused; None: the wait was not given up.
        """
        if self.of_all.is_given_up:
            self.of_all.turn_away()
            return self._fleet.describe_absence()
        if request.needs_grammars and self.of_grammars.is_given_up:
            return self._fleet.describe_absence_of_grammars()
        return None

    def stop(self) -> None:
        """Stop the timers of the outages."""
        self.of_all.stop()
        self.of_grammars.stop()

    def _on_all_given_up(self) -> None:
        level = logging.INFO if self._fleet.identity is None else logging.ERROR  # no model yet: still starting
        _log.log(level, "requests end with UNAVAILABLE: %s", self._fleet.describe_absence().message)
        self._on_given_up()

    def _on_grammars_given_up(self) -> None:
        if self._fleet.ready:  # else all requests end
            _log.warning("requests with a grammar end: %s", self._fleet.describe_absence_of_grammars().message)
        self._on_given_up()
