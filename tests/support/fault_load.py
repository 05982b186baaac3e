"""Load for as long as something takes: streams one after the other, each compared with the undisturbed one."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from fault_promises import Fault
from fault_streams import NoFirstTurnError, Stream
from fault_trials import Tally, Trials, unpromised

_AT_ONCE = 16


@asynccontextmanager
async def load(
    trials: Trials, promised: Fault, rng: random.Random, figures: list[str], name: str
) -> AsyncIterator[None]:
    """Run streams while the block runs, wait for their ends, and add a row to the table under HEADINGS.

    Raises AssertionError with everything that is not as it should be.

    Args:
        promised: The fault whose effects on clients are allowed; it is not injected.
    """
    streams: list[Stream] = []
    is_over = asyncio.Event()

    async def ask(own: random.Random) -> None:
        while not is_over.is_set():
            with suppress(NoFirstTurnError):  # as while Redis is away; the next stream is another one
                streams.append(await trials.run_one(own))

    async with asyncio.TaskGroup() as tasks:
        for _ in range(_AT_ONCE):
            tasks.create_task(ask(random.Random(rng.random())))
        yield
        is_over.set()
    tally, wrong = Tally(name, injected=1), []
    for stream in streams:
        odd = trials.differences(stream)
        wrong += [*odd, *unpromised(promised, stream)]
        tally.count(stream, 0.0, is_identical=not odd)
    tokens, refusals = (sum(getattr(stream, each) for stream in streams) for each in ("num_tokens", "refusals"))
    figures.append(f"{tally}, {tokens} tokens, {refusals} refused before they began")
    assert not wrong, "\n".join(wrong)
    await trials.settle()
