"""`make bench`: the engine alone and the whole line on the same model, one after the other at each concurrency.

Both use the same settings and thread count on the same machine within minutes of each other, so their ratio means
something even where absolute figures do not (a shared machine).
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from bench.end_to_end import run_line
from bench.report import RequestTrace, RunResult
from bench.workload import Workload
from clients.launcher import Instance, UpOptions, bring_down, bring_up
from services.common.model_store import pull, resolve
from services.common.model_store.catalogue import CATALOGUE
from services.executor.engine_supervisor import engine_environment
from services.executor.threads import choose_num_threads
from services.executor.weights import read_model_config


class _Quiet:
    """Says what the launcher does in one line per stage."""

    def begin(self, stage: str, detail: str) -> None:
        print(f"starting {stage}: {detail}", file=sys.stderr)

    def waiting(self, detail: str) -> None:
        pass

    def done(self, detail: str) -> None:
        pass


@contextmanager
def _line(model: str, path: Path, home: Path, settings: dict[str, str]) -> Iterator[str]:
    """A line of its own on free ports; gives the public address."""
    with tempfile.TemporaryDirectory(prefix="scalellm-bench-") as folder:
        instance = Instance(Path(folder), "bench")
        environment = {**os.environ, **{f"SCALELLM_EXECUTOR_{key.upper()}": value for key, value in settings.items()}}
        state = bring_up(
            instance,
            UpOptions(model=model, model_path=path, home=home, environment=environment, port=0),
            _Quiet(),
        )
        try:
            yield state.public_address
        finally:
            bring_down(instance, lambda name: None)


def _engine_alone(settings: dict[str, str], workload: Workload) -> RunResult:
    job = json.dumps({"settings": settings, "workload": asdict(workload)})
    done = subprocess.run(
        [sys.executable, "-m", "bench.engine_alone"],
        input=job,
        capture_output=True,
        text=True,
        check=True,
        env=engine_environment(os.environ),
    )
    outcome: dict[str, Any] = json.loads(done.stdout)
    traces = [RequestTrace(**trace) for trace in outcome["traces"]]
    return RunResult("engine alone", workload.concurrency, workload.input_len, outcome["duration"], traces)


def _end_to_end(address: str, workload: Workload) -> RunResult:
    asyncio.run(run_line(address, Workload(1, 1, 16, 4, workload.vocab_size, seed=1)))
    duration, traces = asyncio.run(run_line(address, workload))
    return RunResult("end to end", workload.concurrency, workload.input_len, duration, traces)


def main(
    model: Annotated[str, typer.Option(help="A name from `scalellm models list`, or a path.")] = (
        "smollm2-135m-instruct"
    ),
    concurrency: Annotated[str, typer.Option(help="Requests in flight, one run each, separated by commas.")] = "1,8,64",
    input_len: Annotated[int, typer.Option(min=1, help="Prompt tokens per request.")] = 128,
    output_len: Annotated[int, typer.Option(min=2, help="Generated tokens per request.")] = 128,
    requests: Annotated[int, typer.Option(help="Requests per run; 0: as many as in flight, at least 2.")] = 0,
    home: Annotated[Path, typer.Option(envvar="SCALELLM_HOME", help="The model store.")] = Path("~/.cache/scalellm"),
    output: Annotated[Path | None, typer.Option(help="Write all figures to this JSON file.")] = None,
) -> None:
    """Measure TTFT, ITL and throughput of the engine alone and of the whole line, and their ratio."""
    home = home.expanduser()
    if model in CATALOGUE:
        pull(model, home)
    path = resolve(model, home)
    config = read_model_config(path)
    threads = choose_num_threads(config.hidden_size, config.intermediate_size, torch.float32)
    settings = {"model": str(path), "home": str(home), "num_threads": str(threads), "max_model_len": "1024"}
    results: list[RunResult] = []
    with _line(model, path, home, settings) as address:
        for level in map(int, concurrency.split(",")):
            workload = Workload(level, requests or max(2, level), input_len, output_len, config.vocab_size)
            for result in (_engine_alone(settings, workload), _end_to_end(address, workload)):
                results.append(result)
                print(result.text(), flush=True)
    print(f"{' End to end / engine alone ':=^58}")
    for alone, line in zip(results[::2], results[1::2], strict=True):
        label = f"Output throughput ratio at {alone.concurrency}:"
        print(f"{label:<42}{line.output_throughput / alone.output_throughput:>16.3f}")
    if output is not None:
        record = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "model": model,
            "cpus": len(os.sched_getaffinity(0)),
            "threads": threads,
            "versions": {name: version(name) for name in ("scalellm", "torch", "grpcio", "protobuf")},
            "runs": [result.summary() for result in results],
        }
        output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
