"""The scaling rule: up at once, down late, and never up and down for nothing."""

from __future__ import annotations

import math
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from scalellm.services.scheduler.scaling_rule import GROW_AT, HOLD, PATIENCE, SHRINK_TO, PoolDemand, ScalingRule

LOOK = 5.0  # seconds between two looks
WORK = st.floats(min_value=0.0, max_value=50.0, allow_nan=False)


def demand(work: float, ready: int = 1, stuck_s: float = 0.0) -> PoolDemand:
    return PoolDemand(ready=ready, work=work, stuck_s=stuck_s, is_wanted=work > 0.0 or stuck_s > 0.0)


def play(rule: ScalingRule, works: list[float], begin: float = 0.0) -> list[int]:
    return [rule.update(demand(work), begin + LOOK * number) for number, work in enumerate(works)]


def steady(work: float, seconds: float = 3 * HOLD) -> list[float]:
    return [work] * math.ceil(seconds / LOOK)


def changes(wanted: list[int]) -> int:
    return sum(before != after for before, after in pairwise(wanted))


def test_it_grows_at_once_and_shrinks_after_the_hold() -> None:
    rule = ScalingRule()
    assert rule.update(demand(0.0), 0.0) == 0
    assert rule.update(demand(0.01), 1.0) == 1
    assert rule.update(demand(2.4), 2.0) == 3
    assert rule.update(demand(2.41), 3.0) == 4
    assert rule.update(demand(0.5), 10.0) == 4
    assert rule.update(demand(1.2), 10.0 + HOLD / 2) == 4
    assert rule.update(demand(0.5), 9.9 + HOLD) == 4
    assert rule.update(demand(0.5), 10.0 + HOLD) == 2  # the most that was asked for meanwhile: 1.2 / 0.6


def test_a_pool_without_requests_goes_to_none_and_one_request_brings_it_back() -> None:
    rule = ScalingRule()
    assert play(rule, steady(1.0))[-1] == 2
    assert play(rule, steady(0.0), begin=1e4)[-1] == 0
    turned_away = PoolDemand(ready=0, work=0.0, stuck_s=0.0, is_wanted=True)
    assert rule.update(turned_away, 2e4) == 1


def test_a_request_that_nobody_takes_is_worth_one_executor_and_the_next_when_that_one_did_not_help() -> None:
    rule = ScalingRule()
    assert rule.update(demand(0.3, ready=2, stuck_s=PATIENCE), 0.0) == 1
    assert [rule.update(demand(0.3, 2, PATIENCE + 1), float(now)) for now in range(1, 200)] == [3] * 199
    assert rule.update(demand(0.3, 3, PATIENCE + 1), 200.0) == 4


@given(before=st.lists(WORK, max_size=40), work=WORK)
def test_a_load_that_stays_is_followed_by_one_rise_or_one_fall(before: list[float], work: float) -> None:
    """Whatever was before: after the hold there is a number, it lies between the two shares, and it stays."""
    rule = ScalingRule()
    play(rule, before)
    wanted = play(rule, steady(work), begin=1e4)
    assert changes([rule.wanted, *wanted[-int(HOLD / LOOK) :]]) == 0
    assert all(before <= after for before, after in pairwise(wanted)) or all(
        before >= after for before, after in pairwise(wanted)
    )
    assert changes(wanted) <= 1
    least, most = math.ceil(work / GROW_AT - 1e-9), math.ceil(work / SHRINK_TO - 1e-9)
    assert max(least, work > 0.0) <= wanted[-1] <= max(most, work > 0.0)


@given(executors=st.integers(2, 30), places=st.lists(st.floats(0.0, 1.0), min_size=2, max_size=200))
def test_a_load_that_wobbles_around_a_threshold_never_flaps(executors: int, places: list[float]) -> None:
    """`executors` are there. Their load moves at will between what they need at least and what one fewer could do."""
    low, high = (executors - 1) * SHRINK_TO + 1e-6, executors * GROW_AT
    rule = ScalingRule()
    rule.update(demand(high), 0.0)
    assert rule.wanted == executors
    wanted = play(rule, [low + place * (high - low) for place in places], begin=LOOK)
    assert set(wanted) == {executors}


@given(
    low=WORK,
    high=WORK,
    period=st.integers(2, int(HOLD / LOOK) - 1),
    cycles=st.integers(3, 8),
)
def test_a_load_that_comes_in_waves_shorter_than_the_hold_keeps_its_executors(
    low: float, high: float, period: int, cycles: int
) -> None:
    low, high = min(low, high), max(low, high)
    rule = ScalingRule()
    wanted = play(rule, ([high] + [low] * (period - 1)) * cycles)
    assert set(wanted) == {wanted[0]}
    assert wanted[0] >= high


@given(works=st.lists(WORK, min_size=1, max_size=200))
def test_it_is_never_less_than_what_is_asked_for_now(works: list[float]) -> None:
    rule = ScalingRule()
    for now, work in enumerate(works):
        assert rule.update(demand(work), LOOK * now) >= work


@given(
    requests=st.lists(st.integers(0, 400), min_size=1, max_size=12), start_s=st.integers(0, 60), rows=st.integers(1, 64)
)
def test_with_executors_that_follow_late_each_step_of_load_is_one_change(
    requests: list[int], start_s: int, rows: int
) -> None:
    """The loop closed: what does not fit waits, executors are there `start_s` after they were wanted, and what waits
    counts as much as what runs. No number of executors makes the rule change its mind."""
    rule, ready, coming, now = ScalingRule(), 0, [], 0.0
    for level in requests:
        seen = []
        for _ in range(int((2 * HOLD + 60) / LOOK)):
            now += LOOK
            stuck = LOOK if level > ready * rows else 0.0  # as long as nobody takes one
            wanted = rule.update(PoolDemand(ready, level / rows, stuck, level > 0), now)
            seen.append(wanted)
            coming.append((now + start_s, wanted))
            while coming and coming[0][0] <= now:
                ready = coming.pop(0)[1]
        assert changes(seen) <= 2  # one rise when it comes, or one fall after the hold
        assert ready * rows >= level
