"""aiperf and guidellm load a line, and what they count is what the line counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from foreign_clients import AIPERF, GUIDELLM, environment, run, tokenizer_folder
from line import Line, scrape

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

MODEL = "smollm2-135m-instruct"
NUM_REQUESTS, PROMPT_LEN, MAX_TOKENS = 20, 64, 32


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory, model_dir) -> Path:
    return tokenizer_folder(tmp_path_factory.mktemp("tokenizer"), model_dir(MODEL))


def counts(line: Line) -> tuple[float, float, float]:
    """Requests that ended well by HTTP, tokens of prompts, tokens of answers."""
    found = scrape(line.tokenizer)
    ended = found['scalellm_tokenizer_requests_ended_total{code="OK",outcome="finished",transport="http"}']
    return ended, found["scalellm_prompt_tokens_total"], found["scalellm_generation_tokens_total"]


def more_than(before: tuple[float, ...], line: Line) -> tuple[float, ...]:
    return tuple(after - then for after, then in zip(counts(line), before, strict=True))


def test_aiperf(fake_line: Line, tokenizer: Path, tmp_path: Path) -> None:
    before = counts(fake_line)
    run(
        [
            *(environment(AIPERF).program("aiperf"), "profile", "--model", MODEL, "--endpoint-type", "chat"),
            *("--url", f"http://{fake_line.tokenizer.http_address}", "--streaming", "--tokenizer", str(tokenizer)),
            *("--isl", str(PROMPT_LEN), "--osl", str(MAX_TOKENS), "--extra-inputs", "ignore_eos:true"),
            *("--request-count", str(NUM_REQUESTS), "--concurrency", "4", "--use-server-token-count"),
            *("--ui", "none", "--no-gpu-telemetry", "--artifact-dir", str(tmp_path)),
        ]
    )
    seen = json.loads((tmp_path / "profile_export_aiperf.json").read_text())
    names = ("request_count", "total_usage_prompt_tokens", "total_usage_completion_tokens")
    told = tuple(seen[name]["avg"] for name in names)
    assert told == more_than(before, fake_line)
    assert (told[0], told[2]) == (NUM_REQUESTS, NUM_REQUESTS * MAX_TOKENS)
    assert told[1] >= NUM_REQUESTS * PROMPT_LEN  # and the chat template
    # It reads our metrics beside the API.
    metrics = json.loads((tmp_path / "server_metrics_export.json").read_text())
    assert metrics["summary"]["endpoints_successful"] == [f"http://{fake_line.tokenizer.http_address}/metrics"]


def test_guidellm(fake_line: Line, tokenizer: Path, tmp_path: Path) -> None:
    scenario = {
        "backend": {
            "kind": "openai_http",
            "target": f"http://{fake_line.tokenizer.http_address}",
            "model": MODEL,
        },
        "profile": {"kind": "concurrent", "streams": [4]},
        "constraints": [{"kind": "max_requests", "count": NUM_REQUESTS}],
        "tokenizer": {"kind": "huggingface_auto", "model": str(tokenizer)},
        "data": [{"kind": "synthetic_text", "prompt_tokens": PROMPT_LEN, "output_tokens": MAX_TOKENS}],
        # Otherwise it makes thousands of prompts before it begins.
        "data_loader": {"kind": "pytorch", "samples": NUM_REQUESTS},
        "outputs": [{"kind": "json", "path": str(tmp_path / "report.json")}],
    }
    (tmp_path / "scenario.json").write_text(json.dumps({"spec": scenario}))
    before = counts(fake_line)
    command = [environment(GUIDELLM).program("guidellm"), "run", "--config", str(tmp_path / "scenario.json")]
    run([*command, "--disable-console-interactive"], HF_HUB_OFFLINE="1")
    (benchmark,) = json.loads((tmp_path / "report.json").read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert (totals["successful"], totals["errored"], totals["incomplete"]) == (NUM_REQUESTS, 0, 0)
    names = ("prompt_token_count", "output_token_count")
    tokens = [benchmark["metrics"][name]["successful"]["total_sum"] for name in names]
    assert (NUM_REQUESTS, *tokens) == more_than(before, fake_line)
    assert tokens[1] == NUM_REQUESTS * MAX_TOKENS
