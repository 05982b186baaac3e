"""One line with the fake engine for all clients of a module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from line import Line, start_line
from service_processes import Spawn

FAKE = ("--engine", "fake", "--max-model-len", "2048", "--num-blocks", "1024", "--fake-preset", "h200-llama-8b")


@pytest.fixture(scope="module")
def line(module_spawn: Spawn, module_redis, model_dir) -> Iterator[Line]:
    return start_line(
        module_spawn,
        module_redis,
        model_dir("smollm2-135m-instruct"),
        executors=(FAKE,),
        tokenizer=("--workers", "1"),
    )
