"""`python -m bench.load`: load on ScaleLLM's gRPC API or on any OpenAI-compatible server."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
import uvloop

from bench.load.compare import compare_text
from bench.load.figures import Slo
from bench.load.grpc_target import GrpcTarget
from bench.load.openai_target import OpenAiTarget
from bench.load.records import RequestError
from bench.load.run import Run, read_run
from bench.load.self_test import self_test, self_test_text
from bench.load.session import Session
from bench.load.target import Target, UsageError
from bench.load.vocabulary import Vocabulary
from bench.load.workload import JSON_SCHEMA, Load, Shape, WorkloadName


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
        str,
        typer.Option(
            help="fixed; chat (log-normal lengths); shared (one system prompt); sessions (turns); json; edits."
        ),
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
        typer.Option(help="The model's folder, .gguf or tokenizer.json: prompts of its words, as ids or as text."),
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
            print(self_test_text(uvloop.run(self_test())))
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
        schema = JSON_SCHEMA if workload == "json" else None
        make_target = _target(target, model, connections, api_key, respect_eos, schema)
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
        session = Session(make_target, run, shape, limits if limits.limits_ms else None, output)
        uvloop.run(session.run(loads, words, model, requests, warm_up))
    except (UsageError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None
    except RequestError as error:
        print(f"{target}: {error.kind}: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    if not any(step.figures["ok"] for step in run.steps):
        raise typer.Exit(1)


def _loads(concurrency: int | None, rate: float | None, sweep: str | None) -> list[Load]:
    given = [text for text in (concurrency, None if rate is None else f"{rate}/s", sweep) if text is not None]
    if len(given) > 1:
        raise UsageError("--concurrency, --rate and --sweep: give one of them")
    return [Load.parse(text) for text in str(given[0] if given else 1).split(",")]


def _target(
    address: str, model: str | None, connections: int, api_key: str | None, respect_eos: bool, json_schema: str | None
) -> Callable[[], Target]:
    scheme, found, rest = address.partition("://")
    if found and rest and scheme == "grpc":
        return partial(GrpcTarget, rest, connections=connections, respect_eos=respect_eos, json_schema=json_schema)
    if found and rest and scheme in ("openai+http", "openai+https"):
        base_url = address.removeprefix("openai+")
        options: dict[str, Any] = {"model": model, "api_key": api_key, "respect_eos": respect_eos}
        return partial(OpenAiTarget, base_url, json_schema=json_schema, **options)
    raise UsageError(f"--target: {address!r} begins with none of grpc://, openai+http://, openai+https://")


def _surroundings() -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "versions": {name: version(name) for name in ("scalellm-server", "grpcio", "protobuf", "httpx2")},
    }


if __name__ == "__main__":
    typer.run(main)
