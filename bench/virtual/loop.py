"""An event loop whose clock is virtual: waiting takes no time, and a run follows from its seed."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class VirtualLoop(asyncio.SelectorEventLoop):
    """Instead of waiting for sockets or for the next timer it moves its clock to that timer."""

    _selector: Any  # of asyncio.BaseSelectorEventLoop

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        select = self._selector.select

        def select_at_once(timeout: float | None) -> list[Any]:
            if timeout is None:
                raise RuntimeError("all tasks wait for something that nobody will do")
            if timeout > 0:
                self._now += timeout + 1e-9  # a timer that is due within the clock's resolution must be due
            ready: list[Any] = select(0)
            return ready

        self._selector.select = select_at_once

    def time(self) -> float:
        """Seconds since the loop was made."""
        return self._now

    def time_ns(self) -> int:
        """Nanoseconds since the loop was made."""
        return round(self._now * 1e9)


def run_virtually(job: Coroutine[Any, Any, T], seed: str) -> T:
    """Run a coroutine on a loop of its own, and what it left running to its end; the result is the coroutine's."""

    async def whole() -> T:
        try:
            return await job
        finally:
            while rest := asyncio.all_tasks() - {asyncio.current_task()}:  # those that end may start others
                for task in rest:
                    task.cancel()
                await asyncio.gather(*rest, return_exceptions=True)

    state = random.getstate()
    random.seed(seed)  # services draw their jitter from it
    loop = VirtualLoop()
    try:
        return loop.run_until_complete(whole())
    finally:
        loop.close()
        random.setstate(state)
