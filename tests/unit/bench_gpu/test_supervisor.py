"""Parts that fail, die or hang cost themselves only, and the exit code says so."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import gpu_parts
from bench.gpu import supervisor
from bench.gpu.__main__ import main
from bench.gpu.part import PartResult
from gpu_parts import spec


@pytest.fixture(autouse=True)
def workers_find_the_parts(monkeypatch):
    folders = [str(Path(gpu_parts.__file__).parent), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, folders)))


def run(kinds, tmp_path, capsys):
    path = tmp_path / "record.json"
    code = main(["--dry-run", "--out", str(path)], [spec(kind) for kind in kinds])
    return code, json.loads(path.read_text()), capsys.readouterr().out


def test_what_goes_wrong_is_recorded_and_the_rest_is_run(tmp_path, capsys):
    G = gpu_parts
    parts = [spec(G.Works), spec(G.Fails), spec(G.Raises), spec(G.Dies), spec(G.Unavailable)]
    path = tmp_path / "record.json"
    assert main(["--dry-run", "--out", str(path)], parts) == 1
    content, out = json.loads(path.read_text()), capsys.readouterr().out
    states = {part["name"]: (part["state"], part["error"]) for part in content["parts"]}
    assert states == {
        "works": ("passed", None),
        "fails": ("failed", None),
        "raises": ("failed", "RuntimeError: something broke"),
        "dies": ("failed", "its process ended with code 7"),
        "unavailable": ("skipped", None),
    }
    assert content["passed"] is False
    raised = content["parts"][2]
    assert [check["name"] for check in raised["checks"]] == ["before"]
    assert content["parts"][4]["notes"] == ["not on this machine"]
    assert "FAILED does not hold: on purpose" in out
    assert out.splitlines()[-2].strip("= ").startswith("FAILED in")


def test_without_a_failure_the_exit_code_is_0_and_a_dry_run_has_no_figures(tmp_path, capsys):
    code, content, out = run([gpu_parts.Works], tmp_path, capsys)
    assert code == 0
    assert content["passed"] is True
    assert content["dry_run"] is True
    assert content["parts"][0]["rows"] == [{"name": "row", "figure": None, "count": 3}]
    assert "1.5" not in out
    assert "1 of 2 checks hold, 1 not judged" in out


def test_a_part_that_hangs_is_stopped():
    heard: list[PartResult] = []
    parts = [spec(gpu_parts.Works), spec(gpu_parts.Hangs, timeout=0.5), spec(gpu_parts.Unavailable)]
    results = supervisor.Supervisor(dry_run=True, budget_s=1000).run(parts, on_result=heard.append)
    assert [result.state for result in results] == ["passed", "failed", "skipped"]
    assert results[1].error == "stopped: no result after 0 s"
    assert heard == results


def test_a_machine_without_a_gpu_is_told_so(capsys):
    if os.path.exists("/dev/nvidia0"):
        pytest.skip("there is one")
    assert main([], [spec(gpu_parts.Works)]) == 1
    assert "torch sees no CUDA device; `--dry-run` needs none" in capsys.readouterr().out


def test_an_unknown_part_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--only", "wroks"], [spec(gpu_parts.Works)])
    assert "there is no part 'wroks'; parts are works" in capsys.readouterr().err


def test_the_supervisor_starts_without_torch():
    code = "import sys, bench.gpu.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=supervisor._ROOT).returncode == 0
