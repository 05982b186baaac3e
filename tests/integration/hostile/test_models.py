"""Mutants of model files of each format: loaded or refused in a line, within bounds of memory and time."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from lying_models import FORMATS, is_fine, mutants, outcomes


@pytest.mark.parametrize("format", FORMATS)
def test_mutants(format: str, num_mutants: int, run_seed: int, table: list[str], tmp_path: Path) -> None:
    counts, wrong = Counter[str](), []
    for mutant, outcome in outcomes(mutants(format, run_seed, num_mutants), tmp_path):
        counts[outcome.partition(":")[0]] += 1
        if not is_fine(outcome):
            wrong.append(f"{mutant}: {outcome}")
    table.append(f"mutants of {format} (HOSTILE_SEED={run_seed}): {counts.total()}: {dict(counts)}")
    assert not wrong, "\n".join(wrong)
