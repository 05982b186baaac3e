"""Looks up where the session of a request ran last."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

from scalellm.services.scheduler.affinity_store import AffinityStore
from scalellm.services.scheduler.request import Request


class SessionLookup:
    """Sets the session's last executor on a request, from memory or from Redis.

    Args:
        affinity: The last executor of each session.
        on_found: Called when a request no longer waits for the look-up.
    """

    def __init__(self, affinity: AffinityStore, on_found: Callable[[], None]) -> None:
        self._affinity = affinity
        self._on_found = on_found

    def start(self, request: Request) -> None:
        """Look up the session of an arriving request, which `awaits_session` until Redis has answered."""
        if not request.session_id:
            return
        request.executor.session_address = self._affinity.get(request.session_id)
        if request.executor.session_address is None and self._affinity.redis_ok:
            request.executor.awaits_session = True
            self._affinity.look_up(request.session_id).add_done_callback(partial(self._found, request))

    def _found(self, request: Request, found: asyncio.Future[str | None]) -> None:
        request.executor.session_address = found.result()
        request.executor.awaits_session = False
        self._on_found()
