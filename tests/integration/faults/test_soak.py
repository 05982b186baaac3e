"""Streams and faults of all kinds for SOAK_SECONDS: nothing is lost, nothing grows. `make soak` takes an hour."""

from __future__ import annotations

import os
import random

import pytest

from fault_line import Shape
from fault_soak import Soak
from fault_trials import Trials
from fault_workload import Workload

SECONDS = float(os.environ.get("SOAK_SECONDS") or 40)
_BETWEEN_FAULTS = 20.0

pytestmark = [pytest.mark.slow, pytest.mark.timeout(SECONDS + 1800)]


async def test_soak(lines, table: list[str], seed: int) -> None:
    line = await lines.get(Shape())
    trials = Trials(line, Workload(seed, longest=400))
    soak = Soak(line, trials, SECONDS, _BETWEEN_FAULTS, random.Random(f"soak {seed}"))
    try:
        await soak.run()
    finally:
        table.append(f"soak of {SECONDS:.0f} s (FAULTS_SEED={seed}): {dict(soak.counts)}")
        table += soak.wrong  # also if the run itself was broken off
        await lines.discard()
    assert not soak.wrong, "\n".join(soak.wrong)
