"""A line that clients of other people call, as they would call any server of OpenAI's API."""

from __future__ import annotations

from pathlib import Path

import pytest

from line import Line, start_line
from service_processes import Spawn

PROGRAMS = Path(__file__).with_name("programs")


@pytest.fixture(scope="session")
def programs() -> Path:
    """Folder of the programs that use the clients."""
    return PROGRAMS


@pytest.fixture(scope="module")
def fake_line(module_spawn: Spawn, module_redis, model_dir) -> Line:
    """A line whose texts follow from prompt and seed and make no sense."""
    fake = ("--engine", "fake", "--fake-preset", "h200-llama-8b")
    model = model_dir("smollm2-135m-instruct")
    return start_line(module_spawn, module_redis, model, executors=(fake,), tokenizer=("--http-metrics",))


@pytest.fixture(scope="module")
def real_line(module_spawn: Spawn, module_redis, model_dir) -> Line:
    """A line with the real model in float32, as transformers has it."""
    in_float32 = ("--quantization", "none")
    return start_line(module_spawn, module_redis, model_dir("smollm2-135m-instruct"), executors=(in_float32,))
