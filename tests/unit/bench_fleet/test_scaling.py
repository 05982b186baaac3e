"""The scaling rule in the loop: the real scheduler and engines, executors that start and leave as it says."""

from __future__ import annotations

import asyncio
from itertools import pairwise

from bench.fleet.fleet import FleetPlan, Pool, VirtualFleet
from bench.virtual.loop import run_virtually
from fleet_load import hold
from scalellm.services.executor.engine.step_time import StepTimeModel
from scalellm.services.scheduler.scaling import ALL, Scaling

MOST = 6
ROWS = 4
START_S = 20.0
STEPS = StepTimeModel(base=0.5, per_prefill_token=0.0, per_decode=0.0, per_context_token=0.0)


async def play(phases: list[tuple[int, float]]) -> list[tuple[float, int]]:
    """Keep so many requests in flight for so many seconds; the numbers that were wanted, and since when."""
    loop = asyncio.get_running_loop()
    fleet = VirtualFleet(FleetPlan((Pool(MOST, steps=STEPS, max_num_seqs=ROWS, num_blocks=512),), num_edges=2))
    await fleet.join()
    for executor in fleet.executors[1:]:
        await executor.leave(0.0)
    scheduler = fleet.scheduler
    scaling = Scaling(scheduler.dispatchers, dict, loop.time)
    wanted: list[tuple[float, int]] = []

    async def operate() -> None:
        """Act as Kubernetes does: a wanted executor is there after a while, one that is not wanted leaves in order."""
        running, coming = 1, []
        while True:
            scaling.look()
            now, goal = loop.time(), min(MOST, max(1, scaling.states[ALL].wanted))
            if not wanted or wanted[-1][1] != scaling.states[ALL].wanted:
                wanted.append((now, scaling.states[ALL].wanted))
            while running + len(coming) < goal:
                coming.append(now + START_S)
            while coming and coming[0] <= now:
                fleet.executors[running].start()
                running, coming = running + 1, coming[1:]
            while running > goal:
                running -= 1
                await fleet.executors[running].leave(30.0)
            await asyncio.sleep(1.0)

    operating = asyncio.create_task(operate())
    await hold(fleet, phases)
    operating.cancel()
    await fleet.rest()
    return wanted


def test_executors_follow_the_load_by_one_change_for_each_step_of_it() -> None:
    wanted = run_virtually(play([(3, 60.0), (14, 150.0), (3, 150.0)]), "scaling")
    numbers = [count for _, count in wanted]
    assert numbers[0] in (0, 1)
    # 14 requests in rows of 4 at 80 %: 5 executors. 3 requests: 1 at 80 %, 2 at 60 %, where the rule stops going down.
    rise = numbers.index(max(numbers))
    assert max(numbers) == 5
    assert all(before < after for before, after in pairwise(numbers[: rise + 1]))
    assert all(before > after for before, after in pairwise(numbers[rise:]))
    assert numbers[-1] == 2
