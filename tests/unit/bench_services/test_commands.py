"""Every load test runs, quickly: all of its code, every figure it owes, no request that failed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "num_sections"),
    [
        ("scheduler", 6),
        ("tokenizer", 5),
        ("line", 2),
        ("executor", 4),
    ],
)
def test_quick(target: str, num_sections: int, tmp_path: Path, model_dir: Callable[[str], Path]) -> None:
    output = tmp_path / "figures.json"
    command = [sys.executable, "-m", "bench.services", target, "--quick", "--output", str(output)]
    model = str(model_dir("smollm2-135m-instruct"))
    done = subprocess.run([*command, "--model", model], cwd=ROOT, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr
    figures = json.loads(output.read_text())
    assert len(figures["sections"]) == num_sections
    assert f"most tokens/s: {figures['max_tokens_per_s']:,.0f}" in done.stdout
    for section in figures["sections"]:
        assert section["title"] in done.stdout
        for row in section["rows"]:
            assert row["counts"].get("errors", 0) == 0, (section["title"], row)
            assert row["counts"][section["cpu_us_per"]] > 0, (section["title"], row)
            assert row["cpu_us"] > 0
            assert row["memory"] > 0
