"""Metrics of the whole line: every promised series is there, and they agree with each other and with the clients."""

from __future__ import annotations

import asyncio
import re
import time

import pytest

from line import Line, scrape, start_line
from mixed_load import PRESSED, Seen, check_books, laws_at_rest, run_mixed_load
from scalellm.cli.main import run
from service_processes import PATIENCE, ROOT, Spawn

VLLM = {
    *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "gpu_cache_usage_perc"),
    *("prefix_cache_queries_total", "prefix_cache_hits_total", "num_preemptions_total", "request_success_total"),
    *("prompt_tokens_total", "generation_tokens_total", "time_to_first_token_seconds", "inter_token_latency_seconds"),
    *("time_per_output_token_seconds", "request_time_per_output_token_seconds", "e2e_request_latency_seconds"),
    *("request_queue_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds"),
    *("request_prompt_tokens", "request_generation_tokens", "iteration_tokens_total"),
}


@pytest.fixture(scope="module")
def line(module_spawn: Spawn, module_redis, model_dir, tmp_path_factory: pytest.TempPathFactory) -> Line:
    traces = tmp_path_factory.mktemp("traces") / "none.jsonl"  # they are on, for their metric, and none is made
    return start_line(
        module_spawn,
        module_redis,
        model_dir("smollm2-135m-instruct"),
        executors=((*PRESSED, "--vllm-metrics"), (*PRESSED, "--vllm-metrics")),
        scheduler=("--vllm-metrics",),
        tokenizer=("--workers", "2", "--vllm-metrics", "--trace-file", str(traces), "--trace-sample-ratio", "0"),
    )


@pytest.fixture(scope="module")
def seen(line: Line) -> Seen:
    """Ends of a mixed load, in which the books balanced all the time. Some series come with their first value."""

    async def play() -> Seen:
        load = asyncio.create_task(run_mixed_load(line, rounds=2))
        while not load.done():
            await asyncio.to_thread(check_books, line)
            await asyncio.sleep(0.1)
        return await load

    return asyncio.run(play())


async def settle(line: Line, seen: Seen) -> dict[str, tuple[float, float]]:
    """The laws that are broken once everything has ended and the workers' figures have had time to arrive."""
    deadline = time.monotonic() + PATIENCE
    while True:
        laws = await asyncio.to_thread(laws_at_rest, line, seen)
        broken = {name: sides for name, sides in laws.items() if sides[0] != sides[1]}
        if not broken or time.monotonic() > deadline:
            return broken
        await asyncio.sleep(0.1)


async def test_counts_agree_from_the_client_down_to_the_engine(line: Line, seen: Seen) -> None:
    assert min(seen.finished, seen.cancelled, seen.late, seen.invalid, seen.preemptions) > 0, seen
    assert await settle(line, seen) == {}
    check_books(line)


def families(line: Line, prefix: str) -> set[str]:
    names = {
        name.split("{")[0] for service in (line.tokenizer, line.scheduler, *line.executors) for name in scrape(service)
    }
    return {re.sub("_(bucket|sum|count)$", "", name).removeprefix(prefix) for name in names if name.startswith(prefix)}


@pytest.mark.usefixtures("seen")
def test_what_is_promised_is_there_and_what_is_there_is_documented(line: Line) -> None:
    documented = re.findall(
        r"^\| `scalellm_(\w+)` \|", (ROOT / "docs" / "operations" / "observe.md").read_text(), re.MULTILINE
    )
    assert len(documented) == len(set(documented))
    assert families(line, "scalellm_") == set(documented)
    assert families(line, "vllm:") == VLLM


def test_top_shows_what_the_line_does(line: Line, capsys: pytest.CaptureFixture[str]) -> None:
    services = (line.tokenizer, line.scheduler, *line.executors)
    addresses = [argument for service in services for argument in ("--metrics", service.metrics_address)]
    deadline = time.monotonic() + PATIENCE
    while run(["top", "--once", "--interval", "0.2", *addresses], {}) != 0:  # each is given a second and a half
        assert time.monotonic() < deadline, capsys.readouterr().out
        capsys.readouterr()
    frame = capsys.readouterr().out
    for service in services:
        assert re.search(rf"^(tokenizer|scheduler|executor) +{service.metrics_address} +ok ", frame, re.MULTILINE), (
            frame
        )
    for executor in line.executors:
        assert re.search(rf"^{executor.metrics_address} +0 +0 .* 0 % ", frame, re.MULTILINE), frame
    assert "0 running, 0 waiting" in frame
    assert run(["top", "--once", "--interval", "0.2", "--metrics", "127.0.0.1:1"], {}) == 1
    assert "does not answer" in capsys.readouterr().out
