"""A whole comparison against echo servers: what is run, what is said, which targets are reached."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from bench.load.openai_target import OpenAiTarget
from bench.load.records import Ended, RequestRecord, Status
from bench.load.vocabulary import Vocabulary
from bench.peers.__main__ import Comparison, main
from bench.peers.environments import PeerError
from bench.peers.measure import Measurement, Plan, decode_rate, warm_up
from bench.peers.report import Report
from bench.peers.serving import free_port, server
from bench.peers.systems import Form, Served, Setup
from bench.peers.targets import targets
from bench.peers.workloads import workloads
from service_processes import PATIENCE
from word_tokenizer import write_word_tokenizer

ROOT = Path(__file__).resolve().parents[3]
PLAN = Plan(1, 60.0, 0, Vocabulary((1, 2)))


class FakeSystem:
    """An echo server in a process of its own."""

    def __init__(
        self, name: str, *, is_ours: bool = False, forms: tuple[str, ...] = ("F16",), broken: str = ""
    ) -> None:
        self.name = name
        self.is_ours = is_ours
        self.forms = tuple(Form(form, 16) for form in forms)
        self.served: list[Setup] = []
        self._broken = broken

    def prepare(self):
        if self._broken == "install":
            raise PeerError("it does not build")
        return {self.name: "1.0"}

    def setup(self, form, need):
        return Setup((form.name, str(need.tokens > 140)))

    @contextmanager
    def serve(self, setup, folder):
        self.served.append(setup)
        if self._broken == setup.command[0]:
            raise PeerError("it does not start")
        command = (sys.executable, "-m", "bench.load.echo", "openai", "0")
        echo = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
        try:
            port = int(echo.stdout.readline())
            yield Served(partial(OpenAiTarget, f"http://127.0.0.1:{port}/v1"), (echo.pid,))
        finally:
            echo.stdin.close()
            echo.wait()


@pytest.mark.slow
def test_a_run_from_installing_to_the_table(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.peers.__main__._TOO_SLOW", float("inf"))  # by chance, one of these echoes would be
    plan = Plan(2, 60.0, 0, Vocabulary.of_words(write_word_tokenizer(tmp_path)))
    loads = workloads(["fixed", "shared", "sessions"], [1, 8], 4, 4, quick=True)
    report = Report({"model": "fake"})
    output = tmp_path / "out.json"
    screen = Console(file=io.StringIO(), width=240)
    comparison = Comparison(plan, loads, [], False, report, partial(report.write, output), screen)
    ours = FakeSystem("scalellm", is_ours=True, forms=("keep", "int8"))
    peer = FakeSystem("peer", forms=("F16", "Q8_0"), broken="Q8_0")
    comparison.run([ours, peer, FakeSystem("other", broken="install")], tmp_path)
    report.print(screen)

    found = json.loads(output.read_text())
    measured = [(entry["system"], entry["form"], entry["workload"]) for entry in found["measurements"]]
    for form in ("keep", "int8"):
        assert ("scalellm", form, "1") in measured
        assert ("scalellm", form, "8") in measured
    # Prefixes: only the form that was the fastest; loads share a server where they want the same of it.
    assert [load for system, _, load in measured if system == "scalellm"].count("sessions") == 1
    assert len(ours.served) == 2 * 4
    assert ("peer", "F16", "shared") in measured
    assert found["failures"] == {"peer Q8_0": "it does not start", "other": "it does not build"}
    assert {len(entry["rates"]) for entry in found["measurements"]} == {2}
    assert all(entry["peak_mb"] > 1 and entry["ttft_p50_s"] > 0 for entry in found["measurements"])
    by_load = {entry["workload"]: set() for entry in found["measurements"]}
    for entry in found["measurements"]:
        by_load[entry["workload"]].add(tuple(entry["prompts"]))
    assert all(len(prompts) == 1 for prompts in by_load.values())
    assert found["notes"] == []
    told = screen.file.getvalue()
    assert "8 at once, tok/s" in told
    assert "not measured: other: it does not build" in told
    # In turns: the second round begins when all had the first. What did not start is not tried again.
    starts = [(form, int(number)) for form, number in re.findall(r"(\w+): starting, round (\d)", told)]
    every_form = [("keep", 1), ("int8", 1), ("F16", 1), ("Q8_0", 1), ("keep", 2), ("int8", 2), ("F16", 2)]
    assert starts[:7] == every_form
    (fastest, _), *_ = about_prefixes = starts[7:]
    assert about_prefixes == [(fastest, 1), ("F16", 1), (fastest, 2), ("F16", 2)]


def entry(system: str, load: str, rate: float, **others) -> Measurement:
    given = {"form": "F16", "bits": 16, "is_ours": system == "scalellm", "ttft_p50_s": 1.0, "ttft_p99_s": 2.0}
    given |= {"decode_rate": rate, "peak_mb": 1.0, "prompts": ("p",), "input_tokens": 1, "output_tokens": 2, **others}
    return Measurement(system=system, workload=load, rates=(rate,), **given)


def test_a_file_names_no_folder_of_the_machine(tmp_path):
    program = str(Path.home() / "peers" / "python")
    report = Report({"model": "fake"})
    report.measurements.append(entry("a", "1", 1.0, command=(program,), environment={"PYTHONPATH": str(ROOT)}))
    report.write(tmp_path / "out.json")
    text = (tmp_path / "out.json").read_text()
    assert str(Path.home()) not in text
    assert str(ROOT) not in text


def test_targets_take_the_best_peer_and_our_fastest_form():
    found = {
        target.name: target
        for target in targets(
            [
                entry("scalellm", "64", 300.0, form="int8", ttft_p50_s=5.0),
                entry("scalellm", "64", 290.0, form="keep", ttft_p50_s=1.0),
                entry("vllm", "64", 100.0, ttft_p50_s=4.0),
                entry("openvino", "64", 199.0, ttft_p50_s=9.0),
                entry("scalellm", "1", 50.0, bits=4),
                entry("scalellm", "1", 40.0, bits=8),
                entry("llama.cpp", "1", 60.0, bits=16),
                entry("llama.cpp", "1", 49.0, bits=4),
                entry("llama.cpp", "1", 41.0, bits=8),
                entry("scalellm", "shared", 100.0),
            ]
        )
    }
    assert {name: target.is_reached for name, target in found.items()} == {
        "64 at once, tok/s": True,
        "1 stream, decode tok/s, 4 bits": True,
        "1 stream, decode tok/s, 8 bits": False,
        "64 at once, TTFT p50": False,
        "64 at once, TTFT p99": True,
        "64 at once, tok/s, against vLLM": False,
    }
    assert found["64 at once, tok/s"].ratio == pytest.approx(300 / 199)
    assert "openvino F16" in found["64 at once, tok/s"].best
    assert "vllm" in found["64 at once, TTFT p50"].best


def test_a_system_far_behind_is_not_waited_for(tmp_path):
    loads = workloads(["fixed", "shared"], [1, 8, 64], 4, 4, quick=False)
    fast = [entry("scalellm", load, 100.0) for load in ("1", "8")]
    slow = [entry("slow", load, 20.0) for load in ("1", "8")]

    def wanted(everything: bool, *measured: Measurement) -> tuple[list[str], dict[str, str]]:
        report = Report({}, measurements=[*fast, *measured])
        comparison = Comparison(PLAN, loads, [], everything, report, lambda: None, Console(file=io.StringIO()))
        return [load.name for load in loads if comparison._is_wanted(FakeSystem("slow"), load)], report.failures

    everywhere = ["1", "8", "64", "shared"]
    assert wanted(False, slow[0]) == (everywhere, {})
    assert wanted(True, *slow) == (everywhere, {})
    names, failures = wanted(False, *slow)
    assert names == ["1"]
    assert "5.0 times slower than the fastest at 8 at once" in failures["slow, 64"]


def answer(*arrivals: float, output_tokens: int, status: Status = "ok") -> RequestRecord:
    return RequestRecord(
        *(0, 0, 1, output_tokens, 0.0, 0.0),
        arrivals=list(arrivals),
        counts=[1] * len(arrivals),
        status=status,
        server=Ended(output_tokens=output_tokens),
    )


@pytest.mark.parametrize(
    ("load", "answers"), [("1", [8]), ("8", [8, 7, 6, 5, 4, 3, 2, 2]), ("64", [*range(64, 1, -1), 2])]
)
def test_a_warm_up_has_batches_of_all_sizes(load, answers):
    (found,) = workloads(["fixed"], [int(load)], 4, 128, quick=False)
    planned = warm_up(found, [1, 2], "seed")
    assert [turn.output_len for conversation in planned for turn in conversation.turns] == answers
    (shared,) = workloads(["shared"], [], 4, 128, quick=False)
    assert max(conversation.turns[0].output_len for conversation in warm_up(shared, [1], "seed")) == 64


def test_decode_rate_is_of_answers_that_came_in_many_messages():
    steady = answer(*(1 + 0.02 * number for number in range(64)), output_tokens=64)
    bunched = answer(1.0, 1.001, output_tokens=64)
    failed = answer(*(1 + 0.5 * number for number in range(64)), output_tokens=64, status="failed")
    assert decode_rate([steady, bunched, failed]) == pytest.approx(50)
    assert decode_rate([bunched]) == 0


def test_what_was_not_alike_is_said():
    report = Report({})
    report.measurements += [entry("scalellm", "8", 1.0), replace(entry("peer", "8", 1.0), output_tokens=3)]
    assert report.notes() == ["8: different output tokens: scalellm F16 2, peer F16 3"]


def test_a_server_that_ends_is_quoted(tmp_path):
    command = (sys.executable, "-c", "print('no such model'); raise SystemExit(2)")
    with (
        pytest.raises(PeerError, match=r"ended with 2 while starting .*\nno such model"),
        server(command, os.environ, tmp_path / "log", f"http://127.0.0.1:{free_port()}/", PATIENCE),
    ):
        pass


@pytest.mark.parametrize(
    ("arguments", "message"), [(["--workloads", "chat"], "--workloads"), (["--systems", "tgi"], "--systems")]
)
def test_refusals_name_the_option(arguments, message, tmp_path):
    app = typer.Typer(add_completion=False)
    app.command()(main)
    (tmp_path / "model.gguf").touch()
    result = CliRunner().invoke(app, [*arguments, "--model", str(tmp_path)], env={"COLUMNS": "400"})
    assert result.exit_code == 2
    assert message in result.output
