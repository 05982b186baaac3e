"""The time limits of an HTTP client: for a whole answer, and between its parts."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self

import grpc

from scalellm.services.common.errors import StatusError


class Deadline:
    """Cancels the task in its context once the client's time is over. Leaving the context then raises
    DEADLINE_EXCEEDED.

    Args:
        total: Seconds for the whole answer; None: no limit.
        gap: Seconds for its first part, and from each part to the next; None: no limit.
    """

    def __init__(self, total: float | None = None, gap: float | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._gap = gap
        self._last = self._loop.time()
        self._end = self._last + total if total is not None else None
        self._timer: asyncio.TimerHandle | None = None
        self._timeout = asyncio.timeout(None)
        self._passed = False

    def progress(self) -> None:
        """Restart the limit between parts, after a part of the answer was written."""
        self._last = self._loop.time()

    def time_remaining(self) -> float | None:
        """Return the seconds left for the rest of the answer; 0 once either limit has passed; None: no limit."""
        if self._passed:
            return 0.0
        return self._end - self._loop.time() if self._end is not None else None

    async def __aenter__(self) -> Self:
        await self._timeout.__aenter__()
        self._check()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        try:
            await self._timeout.__aexit__(kind, error, traceback)
        except TimeoutError:
            raise StatusError(grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline passed") from None

    def _check(self) -> None:
        due = self._end
        if self._gap is not None:
            due = min(self._last + self._gap, due) if due is not None else self._last + self._gap
        if due is None:
            return
        if due <= self._loop.time():
            self._passed = True
            self._timeout.reschedule(self._loop.time())
        else:
            self._timer = self._loop.call_at(due, self._check)
