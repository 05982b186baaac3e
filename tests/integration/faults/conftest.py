"""Lines to break, and a table of what came of it.

`make test-faults` does FAULTS_ROUNDS of each fault, stops processes for FAULTS_SECONDS and plays FAULTS_HISTORIES in
virtual time; everything random follows from FAULTS_SEED, which each failure names.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest

from fault_line import FaultLine, Shape, fault_line
from fault_promises import Fault
from fault_trials import HEADINGS, Tally, Trials
from fault_workload import Workload
from told_at_end import lines_at_end
from told_at_once import pytest_runtest_makereport as pytest_runtest_makereport


@pytest.fixture(scope="session")
def rounds() -> int:
    """Trials of each fault."""
    return int(os.environ.get("FAULTS_ROUNDS") or 1)


@pytest.fixture(scope="session")
def seconds() -> float:
    """For which a process is stopped."""
    return float(os.environ.get("FAULTS_SECONDS") or 3)


@pytest.fixture(scope="session")
def seed() -> int:
    """Seed of all random choices."""
    return int(os.environ.get("FAULTS_SEED") or 0)


class Lines:
    """One line at a time, of the shape that was asked for last; another one after it was found broken."""

    def __init__(self, folder: Callable[[], Path], model: Path) -> None:
        self._folder = folder
        self._model = model
        self._stack = ExitStack()
        self._line: FaultLine | None = None

    async def get(self, shape: Shape) -> FaultLine:
        if self._line is None or self._line.shape != shape:
            await self.discard()
            started = fault_line(shape, self._folder(), self._model)
            self._line = await asyncio.to_thread(self._stack.enter_context, started)
            await self._line.wait_linked()
        return self._line

    async def discard(self) -> None:
        self._line = None
        await asyncio.to_thread(self._stack.close)


@pytest.fixture(scope="session")
def lines(tmp_path_factory: pytest.TempPathFactory, model_dir) -> Iterator[Lines]:
    lines = Lines(lambda: tmp_path_factory.mktemp("line"), model_dir("smollm2-135m-instruct"))
    yield lines
    asyncio.run(lines.discard())


@pytest.fixture(scope="session")
def table(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """Rows to print at the end, sorted below their headings."""
    rows: list[str] = []
    yield rows
    if rows:
        lines_at_end(request.config, "faults").extend((HEADINGS, *sorted(rows)))


@pytest.fixture
def try_faults(tmp_path: Path, table: list[str], seed: int) -> Callable[..., Awaitable[None]]:
    """Tries some faults, each once, on a line of a real model that is started for them."""

    async def try_all(
        title: str, model: Path, engine: str, shape: Shape, faults: Mapping[str, Fault], seconds: float, *, count: int
    ) -> None:
        stack = ExitStack()
        try:
            line = await asyncio.to_thread(stack.enter_context, fault_line(shape, tmp_path, model, engine=engine))
            await line.wait_linked()
            trials = Trials(line, Workload(seed, count=count, longest=60))
            await trials.prepare()
            for name, fault in faults.items():
                tally = Tally(f"{title}, {name}")
                await trials.run(fault, seconds, random.Random(f"{name} {seed}"), tally)
                table.append(str(tally))
        finally:
            await asyncio.to_thread(stack.close)

    return try_all
