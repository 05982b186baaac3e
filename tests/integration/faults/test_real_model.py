"""The same on the real model: who dies does not change a text."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from fault_line import Shape, fault_line
from fault_promises import FAULTS
from fault_streams import Workload
from fault_trials import Tally, Trials

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


async def test_deaths_on_the_real_model(tmp_path: Path, model_dir, table: list[str], seed: int) -> None:
    context = fault_line(Shape(workers=1), tmp_path, model_dir("smollm2-135m-instruct"), engine="model")
    line = await asyncio.to_thread(context.__enter__)
    try:
        await line.wait_linked()
        trials = Trials(line, Workload(seed, count=14, longest=60))
        await trials.prepare()
        for name in ("engine: kill -9", "executor: kill -9", "scheduler: kill -9"):
            tally = Tally(f"real model, {name}")
            await trials.run(FAULTS[name], 3, random.Random(f"{name} {seed}"), tally)
            table.append(str(tally))
    finally:
        await asyncio.to_thread(context.__exit__, None, None, None)
