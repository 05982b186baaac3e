"""`make bench`: the engine alone and the whole line on the same model, one after the other at each concurrency.

Both use the same settings and thread count on the same machine within minutes of each other, so their ratio means
something even where absolute figures do not (a shared machine).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import torch
import typer
import uvloop

from bench.load.driver import Driver
from bench.load.figures import summarise
from bench.load.grpc_target import GrpcTarget
from bench.load.records import RequestRecord
from bench.load.run import Run, Step, run_step
from bench.load.vocabulary import Vocabulary
from bench.load.workload import Load, Shape, conversations, digest
from bench.services.processes import cpu_seconds, family, service_module
from scalellm.launcher import Instance, State, UpOptions, bring_down, bring_up
from scalellm.services.common.model_store import pull, resolve
from scalellm.services.common.model_store.catalogue import CATALOGUE
from scalellm.services.executor.engine_environment import engine_environment
from scalellm.services.executor.threads import choose_num_threads
from scalellm.services.executor.weights import read_model_config


class _Quiet:
    """Says what the launcher does in one line per stage."""

    def begin(self, stage: str, detail: str) -> None:
        print(f"starting {stage}: {detail}", file=sys.stderr)

    def waiting(self, detail: str) -> None:
        pass

    def done(self, detail: str) -> None:
        pass


@contextmanager
def _line(model: str, path: Path, home: Path, settings: dict[str, str]) -> Iterator[State]:
    """A line of its own on free ports."""
    with tempfile.TemporaryDirectory(prefix="scalellm-bench-") as folder:
        instance = Instance(Path(folder), "bench")
        environment = {**os.environ, **{f"SCALELLM_EXECUTOR_{key.upper()}": value for key, value in settings.items()}}
        state = bring_up(
            instance,
            UpOptions(models={model: path}, home=home, environment=environment, port=0),
            _Quiet(),
        )
        try:
            yield state
        finally:
            bring_down(instance, lambda name: None)


@dataclass(frozen=True, slots=True)
class _Job:
    """The load of both runs at one concurrency."""

    shape: Shape
    concurrency: int
    num_requests: int
    vocabulary: Vocabulary
    seed: str


def _engine_alone(settings: dict[str, str], job: _Job) -> Step:
    sent = {"shape": asdict(job.shape), "concurrency": job.concurrency, "num_requests": job.num_requests}
    done = subprocess.run(
        [sys.executable, "-m", "bench.engine_alone"],
        input=json.dumps({"settings": settings, "seed": job.seed, **sent}),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=engine_environment(os.environ),
    )
    records = [RequestRecord.from_json(plain) for plain in json.loads(done.stdout)]
    planned = conversations(job.shape, job.vocabulary.alphabet, job.num_requests, job.seed)
    return Step(str(job.concurrency), digest(planned), 0, summarise(records), None, records)


def _cpu_seconds(state: State) -> dict[str, float]:
    """CPU time of each service's processes, and of this one, which makes the load."""
    total: dict[str, float] = {}
    for service in state.services:
        for process in family(service.pid):
            module = service_module(process) or service.name
            total[module] = total.get(module, 0.0) + cpu_seconds(process)
    return total | {"load generator": time.process_time()}


async def _whole_line(address: str, job: _Job) -> Step:
    target = GrpcTarget(address)
    try:
        driver = Driver(target, job.vocabulary)
        alphabet = job.vocabulary.alphabet
        await run_step(
            driver,
            Shape(input_len=16, output_len=4),
            Load(concurrency=1),
            alphabet=alphabet,
            num_requests=1,
            seed="warm-up",
        )
        load = Load(concurrency=job.concurrency)
        return await run_step(driver, job.shape, load, alphabet=alphabet, num_requests=job.num_requests, seed=job.seed)
    finally:
        await target.close()


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
    weight = torch.ones(config.intermediate_size, config.hidden_size)
    threads = choose_num_threads(lambda x: torch.nn.functional.linear(x, weight), config.hidden_size, torch.float32)
    settings = {"model": str(path), "home": str(home), "num_threads": str(threads), "max_model_len": "1024"}
    vocabulary = Vocabulary.of_size(config.vocab_size)
    shape = Shape(input_len=input_len, output_len=output_len)
    alone, line = Run({"target": "engine alone"}), Run({"target": "end to end"})
    cpu_us: list[dict[str, float]] = []
    with _line(model, path, home, settings) as state:
        for number, level in enumerate(map(int, concurrency.split(","))):
            job = _Job(shape, level, requests or max(2, level), vocabulary, f"0/{number}")
            alone.steps.append(_engine_alone(settings, job))
            print(alone.steps[-1].text("Engine alone"), flush=True)
            before = _cpu_seconds(state)
            line.steps.append(uvloop.run(_whole_line(state.public_address, job)))
            tokens = line.steps[-1].figures["output_tokens"]
            cpu_us.append({name: 1e6 * (now - before[name]) / tokens for name, now in _cpu_seconds(state).items()})
            print(line.steps[-1].text("End to end"), flush=True)
    print(f"{' End to end / engine alone ':=^50}")
    for inner, outer in zip(alone.steps, line.steps, strict=True):
        label = f"Output throughput ratio at {inner.load}:"
        print(f"{label:<40} {outer.figures['output_throughput'] / inner.figures['output_throughput']:<10.3f}")
    print(f"{' CPU time per output token, µs ':=^50}")
    for outer, shares in zip(line.steps, cpu_us, strict=True):
        print(f"At {outer.load}: {', '.join(f'{name} {share:,.0f}' for name, share in shares.items())}")
    if output is not None:
        record = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "model": model,
            "cpus": len(os.sched_getaffinity(0)),
            "threads": threads,
            "versions": {name: version(name) for name in ("scalellm-server", "torch", "grpcio", "protobuf")},
            "cpu_us_per_token": cpu_us,
            "runs": [run.as_json() for run in (alone, line)],
        }
        output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
