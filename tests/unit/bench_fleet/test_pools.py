"""Pools through the real services: what executors measure reaches the scheduler, and new requests follow."""

import asyncio
from dataclasses import replace

import pytest

from bench.fleet.fleet import FleetPlan, Pool, VirtualFleet
from bench.fleet.simulation import simulate
from bench.load.workload import Load, Shape, conversations
from bench.virtual.loop import run_virtually
from fleet_load import hold
from scalellm.services.executor.engine.step_time import StepTimeModel

ALPHABET = range(256, 2048)
SMALL = Pool(2, 1, steps=StepTimeModel(11.1e-3, 88e-6, 68e-6, 0.0), max_num_seqs=64, measures=True)
LARGE = Pool(1, 8, steps=StepTimeModel(4.25e-3, 88e-6, 300e-6, 0.0), max_num_seqs=64, measures=True)


def test_the_scheduler_knows_devices_and_step_times():
    async def look():
        fleet = VirtualFleet(FleetPlan((SMALL, LARGE), settings={"pool_policy": "measured"}))
        await fleet.join()
        state = fleet.scheduler.service.get_state()
        return state, asyncio.get_running_loop().time()

    state, _ = run_virtually(look(), "pools")
    assert [(pool.tensor_parallel, pool.executors, pool.devices) for pool in state.pools] == [(8, 1, 8), (1, 2, 2)]
    assert [executor.tensor_parallel for executor in state.executors] == [1, 1, 8]
    for executor, pool in zip(state.executors, (SMALL, SMALL, LARGE), strict=True):
        told, steps = executor.load.step_time, pool.steps
        assert told.base == pytest.approx(steps.base, rel=0.05)
        assert told.per_row == pytest.approx(steps.per_decode, rel=0.1)
        assert told.per_prompt_token == pytest.approx(steps.per_prefill_token, rel=0.1)


@pytest.mark.parametrize(("clients", "best"), [(1, LARGE), (48, SMALL)])
def test_new_requests_go_where_they_end_sooner(clients, best):
    planned = conversations(Shape(input_len=32, output_len=16), ALPHABET, 2 * clients + 2, "pools")
    both = FleetPlan((SMALL, LARGE), settings={"pool_policy": "measured"})
    done = simulate(both, planned, Load(concurrency=clients))
    alone = simulate(replace(both, pools=(best,)), planned, Load(concurrency=clients))
    assert done.num_pool_switches == 0
    assert done.figures["e2e_ms"]["mean"] == pytest.approx(alone.figures["e2e_ms"]["mean"], rel=0.05)


@pytest.mark.parametrize("policy", ["fixed", "measured"])
def test_a_step_of_load_is_one_switch_and_a_wobble_around_the_threshold_none(policy):
    """The policies' thresholds: `measured` has it at 26 requests with these steps, `fixed` up at 64 and down at 48."""
    slow = [
        replace(pool, steps=replace(steps, base=10 * steps.base, per_decode=10 * steps.per_decode))
        for pool, steps in ((SMALL, SMALL.steps), (LARGE, LARGE.steps))
    ]
    middle = {"measured": 26, "fixed": 56}[policy]

    wobble = [(middle - 2, 1.5), (middle + 2, 1.5)] * 6

    async def play():
        fleet = VirtualFleet(FleetPlan(tuple(slow), settings={"pool_policy": policy}))
        await fleet.join()
        seen = []
        for phases in ([(4, 12.0)], [(70, 12.0)], [(4, 12.0), *wobble], [(70, 12.0), *wobble]):
            await hold(fleet, phases)
            seen.append(fleet.scheduler.fleet.pools.num_switches)
        await fleet.rest()
        return seen

    # Few, many, few and then about the threshold, many and then about the threshold.
    assert run_virtually(play(), "steps of load") == [0, 1, 2, 3]
