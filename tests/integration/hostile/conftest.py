"""A line to attack, and a table of what came of it.

`make test-hostile` sends messages for HOSTILE_SECONDS and loads HOSTILE_MUTANTS of each format of a model;
`make test-all` does less of both.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from line import Line, start_line
from service_processes import Spawn
from told_at_end import lines_at_end

FAKE = ("--engine", "fake", "--max-model-len", "2048", "--num-blocks", "512")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.timeout(3600))


@pytest.fixture(scope="session")
def seconds() -> float:
    """Seconds for which messages are sent."""
    return float(os.environ.get("HOSTILE_SECONDS") or 10)


@pytest.fixture(scope="session")
def num_mutants() -> int:
    """Mutants of each file format."""
    return int(os.environ.get("HOSTILE_MUTANTS") or 40)


@pytest.fixture(scope="session")
def run_seed() -> int:
    """Seed of everything random."""
    return int(os.environ.get("HOSTILE_SEED") or 0)


@pytest.fixture(scope="module")
def line(module_spawn: Spawn, module_redis, model_dir) -> Line:
    """One process of each service: what it does for an attacker it does not do for the neighbour."""
    model = model_dir("smollm2-135m-instruct")
    return start_line(module_spawn, module_redis, model, executors=(FAKE,), tokenizer=("--workers", "1"))


@pytest.fixture(scope="session")
def table(request: pytest.FixtureRequest) -> list[str]:
    """Lines to print at the end."""
    return lines_at_end(request.config, "hostile")
