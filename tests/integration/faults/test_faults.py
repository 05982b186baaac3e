"""Each fault under 64 streams of every kind: nobody's tokens are lost, doubled or reordered, and nothing stays behind.

A failure names its seed: `FAULTS_SEED=7 make test-faults PYTEST_ARGS="-k 'scheduler and kill'"` repeats it, as far as
processes that run at once repeat anything.
"""

from __future__ import annotations

import random

import pytest

from fault_line import Shape
from fault_namespace import why_no_namespace
from fault_promises import FAULTS
from fault_trials import Tally, Trials
from fault_workload import KINDS, SHAPED, Workload

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

_SOLE = ("engine", "executor")

TRIALS = [
    *((Shape(on_cable=fault.on_cable), name) for name, fault in FAULTS.items()),
    *((Shape(schedulers=2, on_cable=FAULTS[name].on_cable), name) for name in FAULTS if name.startswith("scheduler")),
    *((Shape(executors=1, on_cable=FAULTS[name].on_cable), name) for name in FAULTS if name.startswith(_SOLE)),
]
"""Each fault on a line with one scheduler and two executors; then what two schedulers, and one executor, change."""


class Prepared:
    """The trials of the line that runs now."""

    def __init__(self) -> None:
        self.trials: Trials | None = None


@pytest.fixture(scope="session")
def prepared() -> Prepared:
    return Prepared()


@pytest.mark.parametrize(("shape", "name"), TRIALS, ids=[f"{name}-{shape}" for shape, name in TRIALS])
async def test_fault(
    lines, prepared: Prepared, table: list[str], rounds: int, seconds: float, seed: int, shape: Shape, name: str
) -> None:
    await _break(lines, prepared, table, rounds, seconds, shape, name, Workload(seed))


@pytest.mark.parametrize("name", ["engine: kill -9", "executor: kill -9", "executor: SIGTERM", "scheduler: kill -9"])
async def test_fault_under_answers_of_a_given_shape(
    lines, prepared: Prepared, table: list[str], rounds: int, seconds: float, seed: int, name: str
) -> None:
    """Fifty of them at once."""
    await _break(
        lines, prepared, table, rounds, seconds, Shape(), name, Workload(seed, count=50, longest=300, kinds=SHAPED)
    )


async def _break(
    lines,
    prepared: Prepared,
    table: list[str],
    rounds: int,
    seconds: float,
    shape: Shape,
    name: str,
    workload: Workload,
) -> None:
    fault, seed = FAULTS[name], workload.seed
    if fault.on_cable and (reason := why_no_namespace()):
        pytest.skip(reason)
    line = await lines.get(shape)
    if fault.needs_disk and not line.redis.can_fill:
        pytest.skip("only root can give Redis a file system of its own")
    known = prepared.trials
    if known is None or known.line is not line or known.workload.kinds != workload.kinds:
        prepared.trials = known = Trials(line, workload)
    tally = Tally(f"{name}, {shape}{'' if workload.kinds == KINDS else ', shaped'}")
    try:
        await known.prepare()
        for number in range(rounds):
            rng = random.Random(f"{name} {seed} {number}")
            await known.run(fault, seconds, rng, tally)
    except BaseException as error:
        await lines.discard()
        error.add_note(f"FAULTS_SEED={seed}, {name}, trial {tally.injected} of this run")
        raise
    finally:
        table.append(str(tally))
