"""The program as it is called: files, page, comparison, refusals."""

import asyncio
import json
import platform
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import typer
from typer.testing import CliRunner

from bench.load.__main__ import main
from bench.load.plots import Axis, distribution
from bench.load.self_test import self_test, self_test_text

ROOT = Path(__file__).resolve().parents[3]


async def load(*arguments: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bench.load", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=ROOT,
    )
    out, err = await process.communicate()
    return process.returncode, out.decode(), err.decode()


async def test_runs_write_files_that_compare(grpc_server, openai_server, tokenizer_file, tmp_path):
    common = ("--sweep", "1,4", "--requests", "8", "--input-len", "6", "--output-len", "5")
    common = (*common, "--slo", "ttft:60000,e2e:60000", "--tokenizer", str(tokenizer_file), "--output")
    targets = {"a": f"grpc://{grpc_server.address}", "b": f"openai+{openai_server.base_url}"}
    ran = await asyncio.gather(
        *(load("--target", target, *common, str(tmp_path / name)) for name, target in targets.items())
    )
    for code, out, err in ran:
        assert code == 0, err
        assert out.count("Serving Benchmark Result") == 2
        assert re.search(r"^Request goodput \(req/s\): +\d", out, re.MULTILINE)
        assert "\x1b" not in out + err

    run = json.loads((tmp_path / "a.json").read_text())
    assert [step["load"] for step in run["steps"]] == ["1", "4"]
    assert {step["figures"]["ok"] for step in run["steps"]} == {8}
    assert run["model"] == "scripted"
    requests = [json.loads(line) for line in (tmp_path / "a.requests.jsonl").read_text().splitlines()]
    assert len(requests) == 16
    assert {len(request["arrivals_us"]) for request in requests} == {5}

    compared = CliRunner().invoke(_app(), ["--compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    assert compared.exit_code == 0
    assert "output_throughput" in compared.output
    assert "other prompts" not in compared.output

    for name in targets:
        _check_page((tmp_path / f"{name}.html").read_text(), has_breakdown=name == "a")


def _check_page(text: str, *, has_breakdown: bool) -> None:
    tree = ElementTree.fromstring(text.partition("\n")[2])
    tags = {element.tag.rpartition("}")[2] for element in tree.iter()}
    assert not tags & {"script", "link", "img", "iframe", "object", "image", "use"}
    for element in tree.iter():
        assert not {"src", "href"} & {name.rpartition("}")[2] for name in element.attrib}
    assert "url(" not in text
    assert "@import" not in text
    facts = next(element for element in tree.iter() if element.get("class") == "facts")
    for word in ("server ", platform.machine(), "grpcio "):
        assert word in (facts.text or "")
    # Three trade-offs, three distributions, a waterfall per step.
    drawings = sum(element.tag.endswith("}svg") for element in tree.iter())
    assert drawings == 6 + 2 * has_breakdown
    assert "nan" not in re.sub(r"<pre>.*?</pre>", "", text, flags=re.DOTALL).lower()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "http://x"], "--target"),
        (["--concurrency", "8", "--rate", "1"], "give one of them"),
        (["--sweep", "1,none"], "is no load"),
        (["--concurrency", "0"], "is no load"),
        (["--workload", "mixed"], "--workload"),
        (["--cancel-share", "0.5", "--no-stream"], "--cancel-share"),
        (["--slo", "fast:1"], "is no limit"),
        (["--deadline-s", "0"], "--deadline-s"),
        (["--tokenizer", "/nowhere"], "--tokenizer"),
        (["--compare", "/nowhere", "/nowhere"], "is no run"),
    ],
)
def test_refusals_name_the_option(arguments, message):
    result = CliRunner().invoke(_app(), arguments, env={"COLUMNS": "400"})
    assert result.exit_code == 2
    assert message in result.output


async def test_a_model_that_the_server_has_not(grpc_server):
    code, _, err = await load("--target", f"grpc://{grpc_server.address}", "--model", "other")
    assert code == 2
    assert "--model" in err


def test_nobody_there_is_said_in_one_line():
    result = CliRunner().invoke(_app(), ["--target", "grpc://127.0.0.1:1"])
    assert result.exit_code == 1
    assert result.output.startswith("grpc://127.0.0.1:1: UNAVAILABLE")


async def test_the_warm_up_is_not_counted_and_has_no_deadline(grpc_server):
    code, out, err = await load(
        *("--target", f"grpc://{grpc_server.address}", "--requests", "3", "--warm-up", "2", "--deadline-s", "30"),
        *("--input-len", "6", "--output-len", "5"),
    )
    assert code == 0, err
    assert re.search(r"^Successful requests: +3 *$", out, re.MULTILINE)
    assert sorted(request.sampling.max_tokens for request in grpc_server.requests) == [4, 4, 5, 5, 5]
    assert [deadline > 60 for deadline in grpc_server.deadlines] == [True, True, False, False, False]


async def test_the_self_test_measures_both_protocols():
    steps = await self_test(concurrency=4, num_requests=8, output_len=4)
    assert {protocol: step.figures["ok"] for protocol, step in steps.items()} == {"grpc": 8, "openai": 8}
    assert all(step.generator.messages_per_cpu_s > 0 for step in steps.values())
    assert "messages/s of CPU" in self_test_text(steps)


@pytest.mark.parametrize("values", [[0.0], [3.0], [0.001, 12345.0], [1.0, 10.0], [7.0, 7.0]])
@pytest.mark.parametrize("is_log", [True, False])
def test_axes_hold_their_values(values, is_log):
    axis = Axis.around("", values, is_log=is_log)
    assert all(-1e-9 <= axis.place(value) <= 1 + 1e-9 for value in (*values, *axis.ticks()))
    assert len(axis.ticks()) >= 2


def test_a_distribution_is_thinned_but_keeps_its_ends():
    points = distribution("", range(10_000)).points
    assert len(points) <= 400
    assert points[0] == (0, 1e-4)
    assert points[-1] == (9999, 1.0)


def _app():
    app = typer.Typer(add_completion=False)
    app.command()(main)
    return app
