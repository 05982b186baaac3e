"""`make gpu GPU_ARGS="--first --dry-run"`: every path of what a borrowed GPU is used for, without one."""

import json
import os
import subprocess
import sys
from pathlib import Path

from bench.gpu.parts import FIRST, PARTS

ROOT = Path(__file__).resolve().parents[3]


def test_every_part_finds_something_and_it_is_kept(tmp_path):
    command = [sys.executable, "-m", "bench.gpu", "--first", "--dry-run"]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, env={**environment, "OUT": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    findings = [json.loads(line) for line in (tmp_path / "findings.jsonl").read_text().splitlines()]
    for spec in (spec for spec in FIRST if spec not in PARTS):  # the others are in the dry run without --first
        of_part = [finding for finding in findings if finding["part"] == spec.name]
        assert any("row" in finding for finding in of_part), spec.name
        assert any("check" in finding for finding in of_part), spec.name
        assert of_part[-1]["end"]["state"] == "passed"
    assert (tmp_path / "report.txt").read_text() == done.stdout
