"""`python -m bench.load`: load on ScaleLLM's gRPC API or on any OpenAI-compatible server."""

from __future__ import annotations

import asyncio
import math
import os
import platform
import sys
import uuid
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.load.compare import compare_text
from bench.load.driver import Driver
from bench.load.figures import Slo
from bench.load.grpc_target import GrpcTarget
from bench.load.openai_target import OpenAiTarget
from bench.load.page import page
from bench.load.records import RequestError
from bench.load.run import Run, read_run, run_step
from bench.load.self_test import self_test, self_test_text
from bench.load.target import Target, UsageError
from bench.load.vocabulary import Vocabulary
from bench.load.workload import Load, Shape, WorkloadName

_OPEN_LOOP_S = 30
_WARM_UP_OUTPUT = 4


def main(
    target: Annotated[
        str, typer.Option(help="grpc://127.0.0.1:50051, or openai+http://127.0.0.1:8000/v1 (or openai+https).")
    ] = "grpc://127.0.0.1:50051",
    model: Annotated[str | None, typer.Option(help="The model to ask for; default: the server's first.")] = None,
    concurrency: Annotated[int | None, typer.Option(help="Closed loop: requests in flight.")] = None,
    rate: Annotated[float | None, typer.Option(help="Open loop: requests per second (Poisson).")] = None,
    sweep: Annotated[str | None, typer.Option(help="Several steps: 1,8,64, or rates: 0.5/s,1/s,2/s.")] = None,
    requests: Annotated[
        int, typer.Option(min=0, help="Requests per step; 0: four times the concurrency, 30 s of the rate, at least 8.")
    ] = 0,
    warm_up: Annotated[int, typer.Option(min=0, help="Short requests before the first step, not counted.")] = 2,
    workload: Annotated[
        str, typer.Option(help="fixed; chat (log-normal lengths); shared (one system prompt); sessions (turns).")
    ] = "fixed",
    input_len: Annotated[int, typer.Option(min=1, help="Prompt tokens; the median for chat.")] = 128,
    output_len: Annotated[int, typer.Option(min=1, help="Generated tokens; the median for chat.")] = 128,
    max_len: Annotated[int, typer.Option(min=2, help="chat: most tokens of prompt and answer together.")] = 4096,
    prefix_len: Annotated[int, typer.Option(min=1, help="shared: tokens of the shared prompt.")] = 512,
    turns: Annotated[int, typer.Option(min=1, help="sessions: turns of each.")] = 4,
    think_s: Annotated[float, typer.Option(min=0, help="sessions: mean seconds before the next turn.")] = 0.0,
    cancel_share: Annotated[float, typer.Option(min=0, max=1, help="Share of requests cancelled on the way.")] = 0.0,
    stream: Annotated[bool, typer.Option(help="Tokens as they come, or whole answers.")] = True,
    deadline_s: Annotated[float | None, typer.Option(help="Seconds that each request may take.")] = None,
    slo: Annotated[str, typer.Option(help="Limits in ms for goodput: ttft:200,itl:50,tpot:50,e2e:2000.")] = "",
    respect_eos: Annotated[bool, typer.Option(help="Let answers end where the model ends them.")] = False,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="tokenizer.json or its folder: prompts of whole words, the same for every target."),
    ] = None,
    connections: Annotated[int, typer.Option(min=1, help="grpc: connections to spread the streams over.")] = 1,
    seed: Annotated[int, typer.Option(help="Prompts, lengths, arrivals and cancellations follow from it.")] = 0,
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", help="openai: the bearer token.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write PATH.json, PATH.requests.jsonl and PATH.html.")] = None,
    self_test_only: Annotated[bool, typer.Option("--self-test", help="Measure the generator itself.")] = False,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(help="Compare two runs' JSON files; nothing is sent.")
    ] = None,
) -> None:
    """Measure a server: TTFT, TPOT, ITL, end-to-end latency, throughput, goodput."""
    try:
        if compare is not None:
            print(compare_text(*map(read_run, compare)))
            return
        if self_test_only:
            print(self_test_text(asyncio.run(self_test())))
            return
        if workload not in get_args(WorkloadName):
            raise UsageError(f"--workload: {workload!r} is none of {', '.join(get_args(WorkloadName))}")
        if cancel_share and not stream:
            raise UsageError("--cancel-share: requests are cancelled at a token, which --no-stream does not see")
        if deadline_s is not None and deadline_s <= 0:
            raise UsageError(f"--deadline-s: {deadline_s:g} is not above 0")
        name: Any = workload
        shape = Shape(name, input_len, output_len, max_len, prefix_len, turns, think_s, cancel_share)
        loads, limits = _loads(concurrency, rate, sweep), Slo.parse(slo)
        words = Vocabulary.of_words(tokenizer) if tokenizer is not None else None
        server = _target(target, model, connections, api_key, respect_eos)
        options = {
            "shape": asdict(shape),
            "seed": seed,
            "stream": stream,
            "respect_eos": respect_eos,
            "deadline_s": deadline_s,
            "slo_ms": limits.limits_ms,
            "warm_up": warm_up,
            "connections": connections,
            "tokenizer": tokenizer is not None,
        }
        run = Run({"target": target, "model": model or "", "options": options, **_surroundings()})
        session = _Session(server, run, shape, limits if limits.limits_ms else None, output)
        asyncio.run(session.run(loads, words, model, requests, warm_up))
    except (UsageError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None
    except RequestError as error:
        print(f"{target}: {error.kind}: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    if not any(step.figures["ok"] for step in run.steps):
        raise typer.Exit(1)


class _Session:
    """The steps of one call of the program, with its progress and its files."""

    def __init__(self, server: Target, run: Run, shape: Shape, slo: Slo | None, output: Path | None) -> None:
        self._server = server
        self._run = run
        self._shape = shape
        self._slo = slo
        self._output = output

    async def run(
        self, loads: list[Load], words: Vocabulary | None, model: str | None, num_requests: int, warm_up: int
    ) -> None:
        try:
            vocabulary = await self._meet(words, model)
            options = self._run.header["options"]
            driver = Driver(
                self._server,
                vocabulary,
                session_prefix=f"bench-{uuid.uuid4().hex[:8]}",
                stream=options["stream"],
                deadline_s=options["deadline_s"],
            )
            if warm_up:
                await self._warm_up(driver, vocabulary, warm_up)
            with _progress() as progress:
                for number, load in enumerate(loads):
                    await self._step(driver, vocabulary, load, f"{options['seed']}/{number}", num_requests, progress)
        finally:
            await self._server.close()

    async def _meet(self, words: Vocabulary | None, model: str | None) -> Vocabulary:
        """Ask the server what it is, and choose the tokens of the prompts."""
        info = await self._server.info()
        if model is not None and self._server.takes_token_ids and model != info.model:
            raise UsageError(f"--model: {model} is asked for, the server has {info.model}")
        self._run.header |= {"model": info.model, "server_version": info.version}
        if words is not None:
            return words
        if self._shape.workload == "sessions" or not self._server.takes_token_ids:
            raise UsageError("--tokenizer: sessions, and prompts for OpenAI's API, are sent as text and need one")
        if not info.vocab_size:
            raise UsageError("--tokenizer: the server does not say how large its vocabulary is")
        return Vocabulary.of_size(info.vocab_size)

    async def _warm_up(self, driver: Driver, vocabulary: Vocabulary, count: int) -> None:
        lengths = {**asdict(self._shape), "cancel_share": 0.0, "think_s": 0.0}
        lengths["output_len"] = min(_WARM_UP_OUTPUT, self._shape.output_len)
        load = Load(concurrency=count)
        step = await run_step(
            driver, Shape(**lengths), load, alphabet=vocabulary.alphabet, num_requests=count, seed="warm-up"
        )
        failed = next((record for record in step.records if record.status == "failed"), None)
        if failed is not None:
            raise RequestError(failed.kind, f"the warm-up failed: {failed.message}")

    async def _step(
        self, driver: Driver, vocabulary: Vocabulary, load: Load, seed: str, num_requests: int, progress: Progress
    ) -> None:
        count = num_requests or max(8, 4 * (load.concurrency or 0), math.ceil(_OPEN_LOOP_S * (load.rate or 0)))
        bar = progress.add_task(f"load {load}", total=count)
        step = await run_step(
            driver,
            self._shape,
            load,
            alphabet=vocabulary.alphabet,
            num_requests=count,
            seed=seed,
            slo=self._slo,
            on_end=lambda record: progress.advance(bar),
        )
        self._run.steps.append(step)
        progress.stop_task(bar)
        print(step.text("Serving Benchmark Result"), flush=True)
        # After every step: what was measured is not lost when a later one is interrupted.
        if self._output is not None:
            self._run.write(self._output)
            self._output.with_name(f"{self._output.name}.html").write_text(page(self._run))


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    return Progress(*columns, console=console, disable=not console.is_terminal, refresh_per_second=4)


def _loads(concurrency: int | None, rate: float | None, sweep: str | None) -> list[Load]:
    given = [text for text in (concurrency, None if rate is None else f"{rate}/s", sweep) if text is not None]
    if len(given) > 1:
        raise UsageError("--concurrency, --rate and --sweep: give one of them")
    return [Load.parse(text) for text in str(given[0] if given else 1).split(",")]


def _target(
    address: str, model: str | None, connections: int, api_key: str | None, respect_eos: bool
) -> GrpcTarget | OpenAiTarget:
    scheme, found, rest = address.partition("://")
    if found and rest and scheme == "grpc":
        return GrpcTarget(rest, connections=connections, respect_eos=respect_eos)
    if found and rest and scheme in ("openai+http", "openai+https"):
        base_url = address.removeprefix("openai+")
        return OpenAiTarget(base_url, model=model, api_key=api_key, respect_eos=respect_eos)
    raise UsageError(f"--target: {address!r} begins with none of grpc://, openai+http://, openai+https://")


def _surroundings() -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "versions": {name: version(name) for name in ("scalellm", "grpcio", "protobuf", "httpx2")},
    }


if __name__ == "__main__":
    typer.run(main)
