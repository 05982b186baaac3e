"""Every path of `make gpu` without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.gpu.parts import PARTS

ROOT = Path(__file__).resolve().parents[3]


def dry_run(tmp_path, *arguments):
    path = tmp_path / "record.json"
    before = sorted((ROOT / "bench/results").iterdir())
    command = [sys.executable, "-m", "bench.gpu", "--dry-run", "--out", str(path), *arguments]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["OUT"] = str(tmp_path)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert sorted((ROOT / "bench/results").iterdir()) == before
    return done, json.loads(path.read_text())


def assert_every_part_ran(done, content, names):
    assert done.returncode == 0, done.stdout + done.stderr
    assert [part["name"] for part in content["parts"]] == names
    for part in content["parts"]:
        assert part["state"] == "passed", part
        assert part["rows"], part
        assert part["checks"], part
        assert part["error"] is None
        figures = [value for row in part["rows"] for value in row.values() if isinstance(value, float)]
        assert not figures, "a dry run has none"
        assert f" {part['name']} ".center(110, "-") in done.stdout
    assert content["dry_run"] is True
    assert content["passed"] is True
    assert set(content) == {
        "date", "dry_run", "device", "versions", "ceilings", "budget_s", "seconds", "passed", "parts",
    }  # fmt: skip
    assert {"torch", "triton", "python", "cuda"} <= content["versions"].keys()
    assert done.stdout.splitlines()[-2].strip("= ").endswith("dry run: no figures")


def test_the_ceilings(tmp_path):
    done, content = dry_run(tmp_path, "--only", "environment")
    assert_every_part_ran(done, content, ["environment"])


@pytest.mark.slow
def test_every_part(tmp_path):
    done, content = dry_run(tmp_path)
    assert_every_part_ran(done, content, [spec.name for spec in PARTS])
