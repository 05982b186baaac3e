"""The time that a client waits, on a clock that the test turns."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import grpc
import pytest

from scalellm.services.common.errors import StatusError
from scalellm.services.tokenizer.http import deadline as module
from scalellm.services.tokenizer.http.deadline import Deadline


class Timer:
    """One thing that is due."""

    def __init__(self, when: float, callback: Callable[[], None]) -> None:
        self.when = when
        self.callback = callback
        self.is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True


class Clock:
    """The part of an event loop that a deadline looks at."""

    def __init__(self) -> None:
        self.now = 100.0
        self.timers: list[Timer] = []

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, callback: Callable[[], None]) -> Timer:
        self.timers.append(Timer(when, callback))
        return self.timers[-1]

    async def advance(self, seconds: float) -> None:
        self.now += seconds
        due = [timer for timer in self.timers if timer.when <= self.now]
        self.timers = [timer for timer in self.timers if timer not in due]
        for timer in due:
            if not timer.is_cancelled:
                timer.callback()
        for _ in range(3):
            await asyncio.sleep(0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module.asyncio, "get_running_loop", lambda: clock)
    return clock


async def test_the_time_between_parts_counts_from_the_last_one(clock: Clock) -> None:
    async with Deadline(gap=10.0) as deadline:
        for _ in range(5):
            await clock.advance(9.0)
            deadline.progress()
        assert deadline.time_remaining() is None
    with pytest.raises(StatusError) as caught:  # noqa: PT012 - leaving the context raises
        async with Deadline(gap=10.0) as deadline:
            await clock.advance(9.0)
            deadline.progress()
            await clock.advance(9.0)
            await clock.advance(1.0)
    assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert deadline.time_remaining() == 0


async def test_the_whole_has_its_time_whatever_comes(clock: Clock) -> None:
    with pytest.raises(StatusError):  # noqa: PT012 - leaving the context raises
        async with Deadline(total=20.0, gap=10.0) as deadline:
            assert deadline.time_remaining() == 20
            await clock.advance(9.0)
            deadline.progress()
            assert deadline.time_remaining() == 11
            await clock.advance(9.0)
            deadline.progress()
            await clock.advance(2.0)


async def test_without_limits_nothing_is_watched(clock: Clock) -> None:
    async with Deadline() as deadline:
        await clock.advance(1e9)
        assert deadline.time_remaining() is None
    assert clock.timers == []
