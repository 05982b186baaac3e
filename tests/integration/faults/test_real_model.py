"""Faults on the real model: no death changes a text."""

from __future__ import annotations

import pytest

from fault_line import Shape
from fault_promises import FAULTS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


async def test_deaths_on_the_real_model(try_faults, model_dir) -> None:
    deaths = {name: FAULTS[name] for name in ("engine: kill -9", "executor: kill -9", "scheduler: kill -9")}
    await try_faults("real model", model_dir("smollm2-135m-instruct"), "model", Shape(workers=1), deaths, 3, count=14)
