"""Traces and logs of requests that cross all three services, as real processes."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import grpc
import pytest

from line import Answer, Line, generate, start_line
from otlp import CLIENT, SERVER, Collector, SpanRecord, by_trace, read_trace_file
from scalellm.client import Client
from scalellm.v1 import common_pb2, generation_pb2
from service_processes import PATIENCE, Spawn, eventually

FAKE = ("--engine", "fake", "--fake-preset", "h200-llama-8b")
MARKER = "xylophone quicksand marmalade"
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
PARENT_ID = "b7ad6b7169203331"
GENERATE = "scalellm.v1.Generation/Generate"
EXECUTE = "scalellm.v1.Executor/Execute"


def request(max_tokens: int = 8, **fields) -> generation_pb2.GenerateRequest:
    sampling = common_pb2.SamplingParams(max_tokens=max_tokens, ignore_eos=True, **fields.pop("sampling", {}))
    return generation_pb2.GenerateRequest(prompt=f"Once upon a time, {MARKER}.", sampling=sampling, **fields)


def traceparent(trace_id: str = TRACE_ID, *, sampled: bool = True) -> tuple[tuple[str, str], ...]:
    return (("traceparent", f"00-{trace_id}-{PARENT_ID}-{'01' if sampled else '00'}"),)


async def ask(line: Line, message: generation_pb2.GenerateRequest, **options) -> Answer:
    async with line.channel() as channel:
        return await generate(channel, message, **options)


def check_nesting(spans: list[SpanRecord]) -> None:
    """Each span lies within its parent, and siblings follow one another."""
    by_id = {span.span_id: span for span in spans}
    for span in spans:
        assert span.start <= span.end, span
        if (parent := by_id.get(span.parent_id)) is not None:
            assert parent.start <= span.start, (parent, span)
            assert span.end <= parent.end, (parent, span)
        children = sorted((child for child in spans if child.parent_id == span.span_id), key=lambda s: s.start)
        for earlier, later in pairwise(children):
            assert earlier.end <= later.start, (earlier, later)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("traces")


@pytest.fixture(scope="module")
def line(module_spawn: Spawn, module_redis, model_dir, folder: Path) -> Line:
    """All services share one trace file, and write JSON logs."""
    flags = ("--trace-file", str(folder / "traces.jsonl"), "--log-format", "json")
    return start_line(
        module_spawn,
        module_redis,
        model_dir("smollm2-135m-instruct"),
        executors=((*FAKE, *flags),),
        scheduler=flags,
        tokenizer=("--workers", "2", "--log-requests", *flags),
    )


def spans_of(folder: Path, trace_id: str) -> list[SpanRecord]:
    path = folder / "traces.jsonl"
    return by_trace(read_trace_file(path))[trace_id] if path.exists() else []


async def exported(folder: Path, trace_id: str, *roots: str) -> list[SpanRecord]:
    """The spans of a trace, once those of the given names are there: each service exports about once a second."""
    await eventually(lambda: set(roots) <= {span.name for span in spans_of(folder, trace_id)})
    return spans_of(folder, trace_id)


async def test_one_trace_through_all_services(line: Line, folder: Path) -> None:
    started = time.monotonic_ns()
    answer = await ask(line, request(), metadata=(*traceparent(), ("tracestate", "vendor=1")))
    measured = time.monotonic_ns() - started
    assert answer.code is grpc.StatusCode.OK, answer.details
    spans = await exported(folder, TRACE_ID, GENERATE, "schedule", "execute")
    assert {(span.service, span.name, span.kind) for span in spans} == {
        ("tokenizer", GENERATE, SERVER),
        ("tokenizer", "tokenize", 1),
        ("tokenizer", "scalellm.v1.Scheduler/Connect", CLIENT),
        ("tokenizer", "detokenize", 1),
        ("scheduler", "schedule", SERVER),
        ("scheduler", "queue", 1),
        ("scheduler", EXECUTE, CLIENT),
        ("executor", "execute", SERVER),
        ("executor", "queue", 1),
        ("executor", "prefill", 1),
        ("executor", "decode", 1),
    }
    named = {(span.service, span.name): span for span in spans}
    path = [
        *(("tokenizer", GENERATE), ("tokenizer", "scalellm.v1.Scheduler/Connect"), ("scheduler", "schedule")),
        *(("scheduler", EXECUTE), ("executor", "execute"), ("executor", "decode")),
    ]
    assert named[path[0]].parent_id == PARENT_ID
    for upper, lower in pairwise(path):
        assert named[lower].parent_id == named[upper].span_id
    check_nesting(spans)
    root, latency, usage = named[path[0]], answer.finished.latency, answer.finished.usage
    # The spans tell the same as the breakdown, whose parts add up.
    assert latency.total_ns <= root.end - root.start <= measured
    durations = {key: span.end - span.start for key, span in named.items()}
    assert durations["tokenizer", "tokenize"] == latency.tokenize_ns
    assert durations["executor", "prefill"] == latency.prefill_ns
    assert durations["executor", "decode"] == latency.decode_ns
    assert root.events["first token"] - root.start == latency.ttft_ns
    stages = [span for span in spans if span.parent_id == root.span_id]
    assert 0 <= root.end - root.start - sum(span.end - span.start for span in stages) <= latency.network_ns
    assert (
        root.attributes.items()
        >= {
            "gen_ai.operation.name": "text_completion",
            "gen_ai.request.model": "smollm2-135m-instruct",
            "gen_ai.response.id": answer.started.request_id,
            "gen_ai.usage.input_tokens": usage.prompt_tokens,
            "gen_ai.usage.output_tokens": 8,
            "gen_ai.response.finish_reasons": ["length"],
            "gen_ai.response.time_to_first_chunk": latency.ttft_ns / 1e9,
            "rpc.response.status_code": "OK",
            "scalellm.executor": line.executors[0].address,
        }.items()
    )
    assert {span.status for span in spans} == {0}
    assert {span.trace_state for span in spans} == {"vendor=1"}


async def test_who_decides_what_is_traced(line: Line, folder: Path) -> None:
    unsampled, later = "1" * 32, "2" * 32
    # On one connection all meet the same worker. Each process exports in order: what it has of a request that came
    # before `later` is there once its part of `later` is.
    async with line.channel() as channel:
        answers = [
            await generate(channel, request(), metadata=traceparent(unsampled, sampled=False)),
            await generate(channel, request(request_id="fresh")),
            await generate(channel, request(), metadata=(("traceparent", "00-" + "0" * 32 + f"-{PARENT_ID}-01"),)),
            await generate(channel, request(), metadata=traceparent(later)),
        ]
    assert {answer.code for answer in answers} == {grpc.StatusCode.OK}
    await exported(folder, later, GENERATE, "schedule", "execute")
    traces = by_trace(read_trace_file(folder / "traces.jsonl"))
    assert unsampled not in traces
    assert "0" * 32 not in traces  # an id of zeros is none: a trace of its own
    (fresh,) = (
        spans for spans in traces.values() if "fresh" in (s.attributes.get("gen_ai.response.id") for s in spans)
    )
    assert {GENERATE, "schedule", "execute"} <= {span.name for span in fresh}
    assert [span.name for span in fresh if not span.parent_id] == [GENERATE]
    check_nesting(fresh)


async def test_the_python_client_passes_a_trace_on(line: Line, folder: Path) -> None:
    trace_id = "9" * 32

    def use_client() -> None:
        with Client(line.address) as client:
            assert list(client.generate(request(), metadata=traceparent(trace_id)))[-1].HasField("finished")

    await asyncio.to_thread(use_client)
    (root,) = [span for span in await exported(folder, trace_id, GENERATE) if span.name == GENERATE]
    assert root.parent_id == PARENT_ID


async def be_late(line: Line, folder: Path) -> str:
    """The trace of a request that came as far as the executor before its deadline, which the edge was first to see.

    The client's own timer may be first, and what is heard of is that it left; or all of it takes longer than that.
    """
    for attempt in range(40):
        trace_id, timeout = f"5{attempt:031x}", (0.5, 1.0, 2.0, 4.0)[attempt % 4]
        accepted = (await line.executor_info()).accepted
        answer = await ask(line, request(1500), metadata=traceparent(trace_id), timeout=timeout)
        assert answer.code is grpc.StatusCode.DEADLINE_EXCEEDED
        (root,) = [span for span in await exported(folder, trace_id, GENERATE) if span.name == GENERATE]
        has_come = (await line.executor_info()).accepted > accepted
        if has_come and root.attributes["rpc.response.status_code"] == "DEADLINE_EXCEEDED":
            return trace_id
    raise AssertionError("no deadline passed at the edge first")


async def test_every_end_has_its_status(line: Line, folder: Path) -> None:
    samples, cancelled, refused = ("3" * 32, "4" * 32, "6" * 32)
    answer = await ask(line, request(sampling={"n": 3, "seed": 1}), metadata=traceparent(samples))
    assert answer.code is grpc.StatusCode.OK
    task = asyncio.create_task(ask(line, request(1500), metadata=traceparent(cancelled)))
    async with asyncio.timeout(PATIENCE):
        while (await line.executor_info()).load.running == 0:
            await asyncio.sleep(0.02)
        task.cancel()
        while (await line.executor_info()).load.running:
            await asyncio.sleep(0.02)
    late = await be_late(line, folder)
    answer = await ask(line, request(sampling={"top_p": 7}), metadata=traceparent(refused))
    assert answer.code is grpc.StatusCode.INVALID_ARGUMENT
    everywhere = (GENERATE, "schedule", "execute")
    (root,) = [span for span in await exported(folder, samples, *everywhere) if span.name == GENERATE]
    assert root.attributes["gen_ai.response.finish_reasons"] == ["length"] * 3
    assert root.attributes["gen_ai.usage.output_tokens"] == 24
    for trace_id, code in ((cancelled, "CANCELLED"), (late, "DEADLINE_EXCEEDED")):
        ends = {span.name: span for span in await exported(folder, trace_id, *everywhere) if span.kind == SERVER}
        assert {name: span.attributes["rpc.response.status_code"] for name, span in ends.items()} == dict.fromkeys(
            everywhere, code
        )
        assert {span.status for span in ends.values()} == {2 if code == "DEADLINE_EXCEEDED" else 0}
    (only,) = await exported(folder, refused, GENERATE)
    assert only.attributes["rpc.response.status_code"] == "INVALID_ARGUMENT"


async def test_logs_are_json_with_ids_and_without_prompts(line: Line) -> None:
    answer = await ask(line, request(request_id="logged"), metadata=traceparent("7" * 32))
    assert answer.code is grpc.StatusCode.OK
    bad = await ask(line, request(request_id=f"not an id, {MARKER}"), metadata=traceparent("8" * 32))
    assert bad.code is grpc.StatusCode.INVALID_ARGUMENT
    services = [*line.executors, line.scheduler, line.tokenizer]
    entries = [json.loads(text) for service in services for text in service.log.read_text().splitlines()]
    assert {entry["service"] for entry in entries} >= {"executor", "scheduler", "tokenizer"}
    (entry,) = (entry for entry in entries if entry.get("request_id") == "logged")
    assert (
        entry.items()
        >= {
            "level": "INFO",
            "trace_id": "7" * 32,
            "code": "OK",
            "prompt_tokens": answer.finished.usage.prompt_tokens,
            "completion_tokens": 8,
            "ttft_ms": round(answer.finished.latency.ttft_ns / 1e6, 3),
            "executor": line.executors[0].address,
        }.items()
    )
    (entry,) = (entry for entry in entries if entry.get("trace_id") == "8" * 32)
    assert (entry["code"], entry["field"]) == ("INVALID_ARGUMENT", "request_id")
    everything = "".join(service.log.read_text() for service in services)
    assert not any(word in everything for word in MARKER.split())


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.stop()


async def test_a_collector_gets_spans_and_a_dead_one_costs_nothing(
    spawn: Spawn, redis, model_dir, collector: Collector
) -> None:
    """On the way, an executor dies: each attempt has its span, and the request goes on."""
    alive = ("--otlp-endpoint", collector.endpoint)
    line = start_line(
        spawn,
        redis,
        model_dir("smollm2-135m-instruct"),
        executors=((*FAKE, *alive), (*FAKE, *alive)),
        scheduler=alive,
        tokenizer=("--workers", "1", "--otlp-endpoint", "http://127.0.0.1:9"),  # where nobody listens
    )
    moved = asyncio.create_task(ask(line, request(400, request_id="moved")))
    async with asyncio.timeout(PATIENCE):
        while not any(executor.running for executor in (await line.scheduler_state()).executors):
            await asyncio.sleep(0.02)
    (address,) = (executor.address for executor in (await line.scheduler_state()).executors if executor.running)
    next(executor for executor in line.executors if executor.address == address).kill_tree()
    answer = await moved
    assert answer.code is grpc.StatusCode.OK, answer.details

    def of_moved() -> list[SpanRecord]:
        schedules = [s for s in collector.spans() if s.attributes.get("gen_ai.response.id") == "moved"]
        return [span for span in collector.spans() if span.trace_id in {s.trace_id for s in schedules}]

    names = ["schedule", "queue", EXECUTE, "queue", EXECUTE, "execute", "queue", "prefill", "decode"]
    await eventually(lambda: len(of_moved()) >= len(names))
    spans = sorted(of_moved(), key=lambda span: (span.start, -span.end))
    assert [span.name for span in spans] == names
    check_nesting(spans)
    first, second = (span for span in spans if span.name == EXECUTE)
    assert (first.attributes["server.address"], first.status) == (address, 2)
    assert (second.attributes["rpc.response.status_code"], second.status) == ("OK", 0)
    assert spans[0].attributes["scalellm.executors_tried"] == 2

    await eventually(lambda: "traces cannot be exported" in line.tokenizer.log.read_text())
    answers = await asyncio.gather(*(ask(line, request()) for _ in range(20)))
    assert {answer.code for answer in answers} == {grpc.StatusCode.OK}
    assert line.tokenizer.terminate() == 0  # what cannot be exported is given up within seconds
    log = line.tokenizer.log.read_text()
    assert log.count("traces cannot be exported") == 1
    assert "Traceback" not in log
