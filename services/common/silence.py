"""When a peer counts as dead although its connection stands."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


async def until_silent(limit: float, num_heard: Callable[[], int], is_due: Callable[[], bool] = lambda: True) -> None:
    """Return once nothing has been heard for `limit` seconds.

    Counted in turns of this loop, not by the clock: when this process stood still itself, its peer did not hang, and
    what it said meanwhile is yet to be read.

    Args:
        limit: Seconds.
        num_heard: What was heard so far; any other number than the one before ends a silence.
        is_due: Whether the peer has to say anything now.
    """
    pause = min(1.0, limit / 4)
    silent, heard = 0.0, num_heard()
    while silent <= limit:
        await asyncio.sleep(pause)
        last, heard = heard, num_heard()
        silent = silent + pause if heard == last and is_due() else 0.0
