"""Pools: which executors new requests go to, by load and time."""

from types import SimpleNamespace

import pytest

from scalellm.services.scheduler.pools import Lengths, Pools, predict
from scalellm.v1 import link_pb2

SMALL = link_pb2.StepTime(base=11.1e-3, per_row=68e-6, per_prompt_token=88e-6, per_context_token=0.0)
LARGE = link_pb2.StepTime(base=4.25e-3, per_row=85e-6, per_prompt_token=88e-6, per_context_token=0.0)


def replica(number, tensor_parallel, step_time):
    load = link_pb2.Load()
    if step_time is not None:
        load.step_time.CopyFrom(step_time)
    return SimpleNamespace(
        address=f"host:{number}",
        tensor_parallel=tensor_parallel,
        num_devices=tensor_parallel,
        load=load,
        running={},
        welcome=link_pb2.Welcome(max_num_seqs=1024),
    )


def make_pools(policy, small=SMALL, large=LARGE):
    pools = Pools(policy)
    replicas = [*(replica(number, 1, small) for number in range(8)), replica(8, 8, large)]
    for one in replicas:
        pools.join(one)
    return pools, replicas


def play(pools, *loads):
    """Return pairs of a time and the pool chosen then; loads are (time of the change, requests)."""
    chosen = []
    for (begin, count), (end, _) in zip(loads, [*loads[1:], (loads[-1][0] + 20, 0)], strict=True):
        now = begin
        while now < end:
            chosen.append((now, pools.choose(count, now)))
            now += 0.1
    return chosen


def test_fixed_goes_up_at_64_and_down_below_48_after_five_seconds():
    pools, _ = make_pools("fixed")
    assert {pool for _, pool in play(pools, (0, 1), (10, 63))} == {8}
    assert pools.choose(64, 100.0) == 1
    assert pools.choose(47, 104.9) == 1
    assert pools.choose(48, 106.0) == 1
    assert pools.choose(47, 107.0) == 8
    assert pools.choose(500, 111.9) == 8
    assert pools.choose(500, 112.1) == 1
    assert pools.num_switches == 3


@pytest.mark.parametrize("policy", ["fixed", "measured"])
def test_a_step_of_load_is_one_switch_and_a_wobble_none(policy):
    pools, _ = make_pools(policy)
    chosen = play(pools, (0, 1), (20, 1000), (40, 1))
    assert pools.num_switches == 2
    assert [chosen[0][1], next(pool for now, pool in chosen if now > 30), chosen[-1][1]] == [8, 1, 8]
    lengths = pools.lengths
    even = next(
        count
        for count in range(1, 1000)
        if predict(SMALL, count, 8, 1024, lengths) < predict(LARGE, count, 1, 1024, lengths)
    )
    middle = 64 if policy == "fixed" else even
    for turn in range(600):  # for a second each a few more and a few fewer requests
        if turn == 200:
            switches = pools.num_switches
        pools.choose(round(middle * (0.95 if turn % 20 < 10 else 1.05)), 100.0 + 0.1 * turn)
    assert pools.num_switches == switches


def test_measured_leaves_a_pool_only_for_a_gain_of_a_tenth_that_holds():
    pools, _ = make_pools("measured")
    assert pools.choose(1, 0.0) == 8
    assert pools.choose(1000, 10.0) == 8
    assert pools.choose(1000, 11.9) == 8
    assert pools.choose(1, 11.95) == 8  # the gain was gone for a moment
    assert pools.choose(1000, 12.1) == 8
    assert pools.choose(1000, 14.0) == 8
    assert pools.choose(1000, 14.2) == 1
    alike, _ = make_pools("measured", small=LARGE, large=link_pb2.StepTime(base=4.3e-3, per_row=85e-6))
    first = alike.choose(1, 0.0)
    assert {alike.choose(1, 0.1 * turn) for turn in range(100)} == {first}


def test_the_prediction_is_the_time_of_the_slower_steps():
    lengths = Lengths()
    lengths.expect(700, 90)
    assert (lengths.prompt, lengths.answer) == (700, 90)
    for _ in range(500):
        lengths.observe(100, 50)
    assert (lengths.prompt, lengths.answer) == (pytest.approx(100, rel=1e-3), pytest.approx(50, rel=1e-3))
    step = link_pb2.StepTime(base=0.010, per_row=0.001, per_prompt_token=0.0001, per_context_token=0.0)
    alone = predict(step, 1, 4, 8, lengths)
    assert alone == pytest.approx(0.020 + 50 * (0.011 + 100 / 50 * 0.0001), rel=1e-3)
    assert predict(step, 4, 4, 8, lengths) == alone
    full = predict(step, 32, 4, 8, lengths)
    assert full == pytest.approx(0.020 + 50 * (0.018 + 8 * 2 * 0.0001), rel=1e-3)
    assert predict(step, 64, 4, 8, lengths) == pytest.approx(2 * full)  # half of them wait


def test_without_a_choice_requests_go_anywhere():
    pools, replicas = make_pools("off")
    assert pools.choose(1, 0.0) is None
    pools, replicas = make_pools("measured", small=None)
    assert pools.choose(1, 0.0) is None
    replicas[0].load.step_time.CopyFrom(SMALL)
    assert pools.choose(1, 1.0) == 8
    pools.leave(replicas[8])
    assert pools.choose(1, 2.0) is None
    pools.join(replicas[8])
    assert pools.choose(1, 3.0) == 8
    assert pools.num_switches == 0


def test_the_state_says_where_requests_go_and_why():
    pools, replicas = make_pools("measured")
    replicas[8].running[1] = object()
    pools.choose(2, 0.0)
    large, small = pools.describe()
    assert (large.tensor_parallel, large.executors, large.devices, large.running, large.chosen) == (8, 1, 8, 1, True)
    assert (small.tensor_parallel, small.executors, small.devices, small.running, small.chosen) == (1, 8, 8, 0, False)
    assert large.predicted_s < small.predicted_s
    assert "to the last token" in large.reason
    assert not small.reason
