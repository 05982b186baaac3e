"""DrainRate measures what the executors can take, not what was asked of them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scalellm.services.scheduler.rates import DrainRate


@given(rate=st.floats(1, 1e5), interval=st.floats(0.001, 2), count=st.integers(5, 200))
def test_a_steady_drain_is_measured_exactly(rate, interval, count):
    meter = DrainRate()
    for i in range(count):
        meter.update(i * interval, 1, rate * interval, held_back=True)
    assert meter.tokens_per_second == pytest.approx(rate)


def test_idle_time_does_not_count():
    meter = DrainRate()
    now = 0.0
    for _ in range(50):
        for _ in range(4):
            meter.update(now, 1, 100, held_back=True)
            now += 0.1
        meter.update(now, 1, 100, held_back=False)
        now += 1000.0
        meter.update(now, 1, 100, held_back=False)
    assert meter.tokens_per_second == pytest.approx(1000.0)


def test_nothing_is_claimed_before_enough_was_seen_or_after_a_reset():
    meter = DrainRate(min_requests=4)
    for i in range(4):
        meter.update(float(i), 1, 10, held_back=True)
        assert meter.tokens_per_second is None
    meter.update(4.0, 1, 10, held_back=True)
    assert meter.tokens_per_second == pytest.approx(10.0)
    meter.reset()
    assert meter.tokens_per_second is None


def test_it_follows_a_change():
    meter = DrainRate(half_life=1.0)
    for i in range(20):
        meter.update(float(i), 1, 100, held_back=True)
    for i in range(20, 40):
        meter.update(float(i), 1, 10, held_back=True)
    assert meter.tokens_per_second == pytest.approx(10.0, rel=0.01)
