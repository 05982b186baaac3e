"""Parts that fail, die or hang cost themselves only, and the exit code says so."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

import gpu_parts
from bench.gpu import report, supervisor, worker
from bench.gpu.__main__ import main
from bench.gpu.part import Check, PartResult
from gpu_parts import spec


@pytest.fixture(autouse=True)
def workers_find_the_parts(monkeypatch, tmp_path):
    folders = [str(Path(gpu_parts.__file__).parent), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, folders)))
    monkeypatch.setenv("OUT", str(tmp_path))


def findings(tmp_path):
    return [json.loads(line) for line in (tmp_path / "findings.jsonl").read_text().splitlines()]


def run(kinds, tmp_path, capsys):
    path = tmp_path / "record.json"
    code = main(["--dry-run", "--out", str(path)], [spec(kind) for kind in kinds])
    return code, json.loads(path.read_text()), capsys.readouterr().out


def test_what_goes_wrong_is_recorded_and_the_rest_is_run(tmp_path, capsys):
    G = gpu_parts
    parts = [spec(kind) for kind in (G.Works, G.Fails, G.Raises, G.OneCaseRaises, G.Dies, G.Unavailable)]
    path = tmp_path / "record.json"
    assert main(["--dry-run", "--out", str(path)], parts) == 1
    content, out = json.loads(path.read_text()), capsys.readouterr().out
    states = {part["name"]: (part["state"], part["error"]) for part in content["parts"]}
    assert states == {
        "works": ("passed", None),
        "fails": ("failed", None),
        "raises": ("failed", "RuntimeError: something broke"),
        "onecaseraises": ("failed", None),
        "dies": ("failed", "its process ended with code 7"),
        "unavailable": ("skipped", None),
    }
    assert content["passed"] is False
    raised = content["parts"][2]
    assert [check["name"] for check in raised["checks"]] == ["before"]
    one_case = content["parts"][3]
    assert [row["name"] for row in one_case["rows"]] == ["first", "third"]
    assert [check["name"] for check in one_case["checks"]] == ["second"]
    kept = [finding for finding in findings(tmp_path) if finding["part"] == "onecaseraises"]
    assert [finding["row"]["name"] for finding in kept if "row" in finding] == ["first", "third"]
    assert "FAILED second: NoRuntimeError: out of resource: shared memory" in out
    assert content["parts"][5]["notes"] == ["not on this machine"]
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


@pytest.mark.slow
def test_what_a_killed_part_had_found_is_kept(monkeypatch):
    heard, clock = [], time.monotonic

    def listen(part, kind, value):
        heard.append((part, kind))
        if (part, kind) == ("hangs", "check"):  # it finds nothing more
            monkeypatch.setattr(time, "monotonic", lambda: clock() + 1e7)
        if (part, kind) == ("hangs", "end"):
            monkeypatch.setattr(time, "monotonic", clock)

    parts = [spec(gpu_parts.Works), spec(gpu_parts.Hangs), spec(gpu_parts.Dies), spec(gpu_parts.Works)]
    results = supervisor.Supervisor(dry_run=True, budget_s=1000, listen=listen).run(parts)
    assert [result.state for result in results] == ["passed", "failed", "failed", "passed"]
    assert [result.error for result in results[1:3]] == [
        "stopped: did not end in 1000015 s",
        "its process ended with code 7",
    ]
    for result in results[1:3]:
        assert result.rows == [{"name": "before", "figure": 0.5, "count": 1}]
    assert [check.name for check in results[1].checks] == ["before"]
    assert [kind for part, kind in heard if part == "hangs"] == ["begin", "row", "check", "end"]


# A thread of its own takes the signal, so that the signal does not interrupt what the main thread waits for: the same
# comes about when a signal arrives just before a wait begins.
WHOLE_RUN = """
import signal, sys, threading, gpu_parts
from bench.gpu.__main__ import main
threading.Thread(target=threading.Event().wait, daemon=True).start()
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
sys.exit(main(["--dry-run"], [gpu_parts.spec(gpu_parts.Works), gpu_parts.spec(gpu_parts.Hangs)]))
"""


@pytest.mark.parametrize("number", [pytest.param(signal.SIGKILL, marks=pytest.mark.slow), signal.SIGTERM])
def test_a_kill_of_the_whole_run_leaves_what_was_found_before(tmp_path, number):
    with subprocess.Popen(
        [sys.executable, "-c", WHOLE_RUN],
        cwd=supervisor._ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        for line in process.stderr:  # a finding is said after it is kept
            if line.startswith("hangs: holds"):
                break
        process.send_signal(number)
        out, _ = process.communicate()
    kept = [(finding["part"], next(iter(finding.keys() - {"part"}))) for finding in findings(tmp_path)]
    begun = [("hangs", "begin"), ("hangs", "row"), ("hangs", "check")]
    assert kept == [("works", k) for k in ("begin", "row", "check", "check", "shared", "end")] + begun
    if number == signal.SIGTERM:
        assert process.returncode == 1
        assert out == (tmp_path / "report.txt").read_text()
        assert "FAILED hangs: did not end" in out
        assert "works" in out


def test_a_slow_part_takes_no_time_from_the_others():
    parts = [spec(gpu_parts.Works, seconds=n) for n in (30, 10, 20)]
    assert worker.share_of(120, parts) == 60
    assert worker.share_of(90, parts[1:]) == 30
    assert worker.share_of(7, [spec(gpu_parts.Works, seconds=0)]) == 7


def test_targets_and_failures_come_last():
    result = PartResult("part", "failed", 1.0, error=None)
    result.take("row", {"name": "a row", "figure": 1.0})
    result.take("check", asdict(Check("fast enough", False, "70 %", target=True)))
    result.take("check", asdict(Check("right", False, "wrong")))
    lines = report.text([result, PartResult("stopped")], dry_run=False, seconds=2).splitlines()
    assert [line.strip("- ") for line in lines[-6:-1]] == [
        "Targets", "FAILED fast enough: 70 %", "Failures", "FAILED right: wrong", "FAILED stopped: did not end",
    ]  # fmt: skip


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
