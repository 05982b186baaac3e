"""Detection of silent peers on open connections, counted in iterations of this process's event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

_PARTS = 4


async def until_silent(limit: float, num_heard: Callable[[], int], is_due: Callable[[], bool] = lambda: True) -> None:
    """Wait until no message has come for `limit` seconds.

    The time is counted in iterations of this event loop, not by the clock, so that a time in which this process itself
    was stopped does not count: messages of the peer from that time have not been read yet.

    Args:
        limit: Seconds.
        num_heard: Returns the number of messages so far. Any change ends a silence.
        is_due: Returns whether a message of the peer is due.
    """
    pause = min(1.0, limit / _PARTS)
    silent, heard = 0.0, num_heard()
    while silent <= limit:
        await asyncio.sleep(pause)
        last, heard = heard, num_heard()
        silent = silent + pause if heard == last and is_due() else 0.0


@asynccontextmanager
async def silence_limit(limit: float) -> AsyncIterator[None]:
    """Context like `asyncio.timeout`, but counted as in `until_silent`, so that messages that came while this process
    was stopped are read before their sender is given up. Raises TimeoutError.

    Args:
        limit: Seconds.
    """
    loop = asyncio.get_running_loop()
    timer: asyncio.TimerHandle | None = None

    def wait(parts: int) -> None:
        nonlocal timer
        if parts:
            timer = loop.call_later(limit / _PARTS, wait, parts - 1)
        else:
            timeout.reschedule(loop.time())

    async with asyncio.timeout(None) as timeout:
        wait(_PARTS)
        try:
            yield
        finally:
            assert timer is not None
            timer.cancel()
