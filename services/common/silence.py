"""Detection of peers that are silent on a standing connection, counted in turns of this process's event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

_PARTS = 4


async def until_silent(limit: float, num_heard: Callable[[], int], is_due: Callable[[], bool] = lambda: True) -> None:
    """Return once nothing has been heard for `limit` seconds.

    Counted in turns of this loop, not by the clock: when this process stood still itself, its peer did not hang, and
    what it said meanwhile is yet to be read.

    Args:
        limit: Seconds.
        num_heard: Number of messages so far; any other number than the one before ends a silence.
        is_due: Tells if the peer has to say anything now.
    """
    pause = min(1.0, limit / _PARTS)
    silent, heard = 0.0, num_heard()
    while silent <= limit:
        await asyncio.sleep(pause)
        last, heard = heard, num_heard()
        silent = silent + pause if heard == last and is_due() else 0.0


@asynccontextmanager
async def silence_limit(limit: float) -> AsyncIterator[None]:
    """As `asyncio.timeout`, but counted as by `until_silent`: what came while this process stood still is read before
    its sender is given up. Raises TimeoutError.

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
