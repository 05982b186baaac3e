"""Sends odd messages to a line beside a neighbour, and counts what comes of them."""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import Awaitable, Callable

from line import Line
from vital_signs import assert_silent, neighbour, rest

AT_ONCE = 6

Counts = Counter[str]
Send = Callable[[int], Awaitable[str]]
"""Sends the message of a number, and names what came of it. Raises AssertionError for what must not."""


async def send_for(seconds: float, send: Send, what: str) -> Counts:
    """Send message after message, some at once, until the time is up. A message follows from its number."""
    counts, end = Counts(), time.monotonic() + seconds
    numbers = iter([int(only)] if (only := os.environ.get("HOSTILE_ONLY")) else range(10**9))

    async def one_after_the_other() -> None:
        for number in numbers:
            try:
                counts[await send(number)] += 1
            except AssertionError as error:
                raise AssertionError(f"{what}, message {number}: {error!r}") from error
            if time.monotonic() > end:
                return

    await asyncio.gather(*(one_after_the_other() for _ in range(AT_ONCE)))
    return counts


async def attack(line: Line, table: list[str], name: str, seconds: float, send: Send, *, by_http: bool = False) -> None:
    """Send for some seconds beside a neighbour, who may come by HTTP, and see that everything is back afterwards."""
    async with neighbour(line, by_http=by_http) as other:
        # What the first messages make grow for good is not what all the others may.
        await send_for(min(10, seconds / 4), send, name)
        before = await rest(line)
        counts = await send_for(seconds, send, name)
    after = await rest(line, before)
    assert_silent(line)
    memory = ", ".join(f"{service} {before.rss[service] >> 20} -> {after.rss[service] >> 20}" for service in after.rss)
    table.append(f"{name}: {counts.total()} sent, neighbour {other.num_answers}, MiB of {memory}: {dict(counts)}")


def describe(run_seed: int, name: str) -> str:
    """Name what was sent, and what repeats it."""
    return f"{name} (HOSTILE_SEED={run_seed})"
