"""The same on an executor of three ranks: one that dies, or stands still, costs a pause."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from fault_line import STALL_LIMITS, Shape, fault_line
from fault_promises import RANK_FAULTS
from fault_streams import Workload
from fault_trials import Tally, Trials

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


async def test_faults_of_ranks(tmp_path: Path, shallow_model: Path, table: list[str], seed: int) -> None:
    context = fault_line(Shape(executors=1, workers=1), tmp_path, shallow_model, engine="ranks")
    line = await asyncio.to_thread(context.__enter__)
    try:
        await line.wait_linked()
        trials = Trials(line, Workload(seed, count=16, longest=60))
        await trials.prepare()
        for name, fault in RANK_FAULTS.items():
            tally = Tally(f"three ranks, {name}")
            await trials.run(fault, STALL_LIMITS["ranks"] + 5, random.Random(f"{name} {seed}"), tally)
            table.append(str(tally))
    finally:
        await asyncio.to_thread(context.__exit__, None, None, None)
