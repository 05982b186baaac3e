"""Faults on an executor of three ranks: a rank that dies, or stands still, costs a pause."""

from __future__ import annotations

from pathlib import Path

import pytest

from fault_line import STALL_LIMITS, Shape
from fault_promises import RANK_FAULTS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


async def test_faults_of_ranks(try_faults, shallow_model: Path) -> None:
    shape, seconds = Shape(executors=1, workers=1), STALL_LIMITS["ranks"] + 5
    await try_faults("three ranks", shallow_model, "ranks", shape, RANK_FAULTS, seconds, count=16)
