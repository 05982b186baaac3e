"""`python -m bench.fleet`: its times are the same in every run and in every process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

from bench.fleet.__main__ import app

ROOT = Path(__file__).resolve().parents[3]


def digests(text: str) -> list[str]:
    return re.findall(r"^digest of all times: ([0-9a-f]{16})$", text, re.MULTILINE)


def test_each_of_the_quick_fleets_goes_the_same_twice() -> None:
    done = CliRunner().invoke(app, ["--quick"])
    assert done.exit_code == 0, done.output
    assert len(set(digests(done.output))) == 3


def test_another_process_has_the_same_times() -> None:
    arguments = ["--executors", "3", "--load", "200/s", "--requests", "12", "--kills", "1"]
    here = CliRunner().invoke(app, arguments)
    assert here.exit_code == 0, here.output
    environment = {**os.environ, "PYTHONHASHSEED": "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"}
    command = [sys.executable, "-m", "bench.fleet", *arguments]
    there = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=600)
    assert digests(there.stdout) == digests(here.output) != []
