"""Outage: how long requests wait while no executor is ready."""

import asyncio

import pytest

from bench.virtual.loop import run_virtually
from scalellm.services.scheduler.outage import Outage

READY, STARTING, GONE = (True, True), (False, True), (False, False)


def given_up_at(*changes: tuple[float, tuple[bool, bool]], grace: float = 30.0, limit: float = 120.0) -> float | None:
    """Return the time at which the outage was given up, if at all; changes are (seconds, state of executors)."""

    async def play() -> float | None:
        loop = asyncio.get_running_loop()
        times: list[float] = []
        outage = Outage(grace, limit, lambda: times.append(loop.time()))
        for when, (is_ready, is_reachable) in changes:
            await asyncio.sleep(when - loop.time())
            outage.update(is_ready=is_ready, is_reachable=is_reachable)
        await asyncio.sleep(3600.0)
        outage.stop()
        assert len(times) <= 1
        assert outage.is_given_up == bool(times)
        return times[0] if times else None

    return run_virtually(play(), "")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([(0, READY)], None),
        ([(0, GONE)], 30),
        ([(0, STARTING)], 120),
        ([(0, READY), (10, GONE)], 40),
        ([(0, READY), (10, STARTING)], 130),
        ([(0, READY), (10, GONE), (39, READY)], None),
        ([(0, READY), (10, STARTING), (129, READY)], None),
        # Failing attempts to connect change nothing.
        ([(0, GONE), (10, GONE), (20, GONE)], 30),
        # A front that its supervisor started again loads the model.
        ([(0, GONE), (20, STARTING)], 120),
        # The front goes away while it loads: its supervisor is waited for.
        ([(0, STARTING), (50, GONE)], 80),
        # One that comes and goes does not hold requests for ever.
        ([(start, state) for start in range(0, 110, 20) for state in (STARTING, GONE)], 120),
    ],
)
def test_requests_wait_for_what_may_come_back(changes, expected):
    when = given_up_at(*changes)
    assert when == (None if expected is None else pytest.approx(expected, abs=0.001))


def test_an_engine_is_waited_for_no_less_than_a_front():
    assert given_up_at((0, STARTING), grace=30.0, limit=5.0) == pytest.approx(30.0, abs=0.001)


def test_once_given_up_only_a_ready_executor_counts():
    assert given_up_at((0, GONE), (50, STARTING)) == pytest.approx(30.0, abs=0.001)

    async def play() -> None:
        outage = Outage(30.0, 120.0, lambda: None)
        outage.update(is_ready=False, is_reachable=False)
        await outage.wait_decided(10.0)
        assert asyncio.get_running_loop().time() == pytest.approx(10.0, abs=0.001)
        await outage.wait_decided(100.0)
        assert asyncio.get_running_loop().time() == pytest.approx(30.0, abs=0.001)
        assert outage.is_given_up
        outage.update(is_ready=True, is_reachable=True)
        assert not outage.is_given_up
        outage.update(is_ready=False, is_reachable=True)
        await outage.wait_decided(1000.0)
        assert asyncio.get_running_loop().time() == pytest.approx(150.0, abs=0.001)

    run_virtually(play(), "")
