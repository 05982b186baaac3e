"""Load on a fleet of bench.fleet that is given as numbers of requests in flight."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from bench.fleet.fleet import VirtualFleet
from bench.load.records import Request

_PAUSE = 0.25


async def hold(fleet: VirtualFleet, phases: Iterable[tuple[int, float]]) -> None:
    """Keep so many requests of 16 tokens in flight for so many seconds, phase by phase; then wait for the rest.

    A number falls as requests end.
    """
    loop = asyncio.get_running_loop()
    tasks: set[asyncio.Task[None]] = set()

    async def one() -> None:
        async for _ in fleet.stream(Request((300, 301, 302), "", 16)):
            pass

    for level, seconds in phases:
        end = loop.time() + seconds
        while loop.time() < end:
            while len(tasks) < level:
                task = asyncio.create_task(one())
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            await asyncio.sleep(_PAUSE)
    await asyncio.gather(*tasks)
