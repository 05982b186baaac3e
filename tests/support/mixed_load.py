"""A load in which every way to end occurs, with what its clients saw, and the laws that metrics must then obey."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import grpc

from line import Line, scrape
from scalellm.v1 import common_pb2, generation_pb2, generation_pb2_grpc

PRESSED = ("--engine", "fake", "--fake-preset", "h200-llama-8b", "--max-model-len", "512", "--num-blocks", "40")
"""An executor whose cache is too small for what `run_mixed_load` asks for: it has to preempt."""


@dataclass
class Seen:
    """Counts of the clients of a load, in requests."""

    sent: int = 0
    finished: int = 0
    cancelled: int = 0
    late: int = 0
    perhaps_lost: int = 0
    """Late requests without any response; they may not have reached the edge or the scheduler."""
    invalid: int = 0
    with_first_token: int = 0
    perhaps_with_first_token: int = 0
    """Late requests whose first token may have left the edge while the client's deadline passed."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    preemptions: int = 0


async def run_mixed_load(line: Line, *, rounds: int = 1) -> Seen:
    """Finished, cancelled, late and invalid requests side by side; some of them are preempted."""
    seen = Seen()
    async with line.channel() as channel:
        stub = generation_pb2_grpc.GenerationStub(channel)
        # Sixteen samples of 60 tokens outgrow 40 blocks.
        await _finish(stub, seen, tokens=20, max_tokens=60, n=16)
        for _ in range(rounds):
            await asyncio.gather(
                *(_finish(stub, seen, tokens=40, max_tokens=40) for _ in range(12)),
                *(_cancel(stub, seen) for _ in range(4)),
                *(_be_late(stub, seen) for _ in range(3)),
                *(_be_wrong(stub, seen) for _ in range(2)),
            )
    return seen


def _request(tokens: int, max_tokens: int, n: int = 1) -> generation_pb2.GenerateRequest:
    return generation_pb2.GenerateRequest(
        tokens=generation_pb2.TokenIds(ids=range(300, 300 + tokens)),
        sampling=common_pb2.SamplingParams(max_tokens=max_tokens, ignore_eos=True, n=n),
    )


async def _finish(stub, seen: Seen, *, tokens: int, max_tokens: int, n: int = 1) -> None:
    seen.sent += 1
    async for response in stub.Generate(_request(tokens, max_tokens, n)):
        if response.WhichOneof("event") == "finished":
            usage = response.finished.usage
    seen.finished += 1
    seen.with_first_token += 1
    seen.prompt_tokens += usage.prompt_tokens
    seen.completion_tokens += usage.completion_tokens
    seen.preemptions += usage.num_preemptions


async def _cancel(stub, seen: Seen) -> None:
    """Leave once the first token is there."""
    seen.sent += 1
    call = stub.Generate(_request(10, 400))
    async for response in call:
        if response.WhichOneof("event") == "delta":
            break
    call.cancel()
    seen.cancelled += 1
    seen.with_first_token += 1


async def _be_late(stub, seen: Seen) -> None:
    seen.sent += 1
    events: set[str] = set()
    try:
        async for response in stub.Generate(_request(10, 500), timeout=0.7):
            events.add(response.WhichOneof("event"))
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
            raise
    assert "finished" not in events
    seen.late += 1
    seen.perhaps_lost += not events
    seen.with_first_token += "delta" in events
    seen.perhaps_with_first_token += "delta" not in events


async def _be_wrong(stub, seen: Seen) -> None:
    """Send a request that is wrong for the edge, and would be wrong for anybody."""
    seen.sent += 1
    try:
        async for _ in stub.Generate(_request(10, 10, n=1000)):
            pass
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.INVALID_ARGUMENT:
            raise
    seen.invalid += 1


def total(samples: dict[str, float], name: str, *labels: str) -> float:
    """The sum of a metric over all its series that have these labels."""
    return sum(
        value for key, value in samples.items() if key.split("{")[0] == name and all(label in key for label in labels)
    )


def check_books(line: Line) -> None:
    """accepted = ended + waiting + running, per service, at this very scrape."""
    edge, core = scrape(line.tokenizer), scrape(line.scheduler)
    ended = total(edge, "scalellm_tokenizer_requests_ended_total") + edge["scalellm_tokenizer_requests_running"]
    assert total(edge, "scalellm_tokenizer_requests_accepted_total") == ended
    for service, samples in [("scheduler", core), *(("executor", scrape(executor)) for executor in line.executors)]:
        name = f"scalellm_{service}"
        held = samples[f"{name}_num_requests_running"] + samples[f"{name}_num_requests_waiting"]
        assert samples[f"{name}_requests_accepted_total"] == total(samples, f"{name}_requests_total") + held


def laws_at_rest(line: Line, seen: Seen) -> dict[str, tuple[float, float]]:
    """Every law's two sides, when nothing is under way: docs/operations/observe.md says them in words."""
    edge, core = scrape(line.tokenizer), scrape(line.scheduler)
    engines = [scrape(executor) for executor in line.executors]

    def of_engines(name: str) -> float:
        return sum(total(engine, f"scalellm_executor_{name}") for engine in engines)

    def of_edge(name: str) -> float:
        return total(edge, f"scalellm_{name}")

    def of_core(name: str) -> float:
        return total(core, f"scalellm_scheduler_{name}")

    def within(value: float, least: float, most: float) -> tuple[float, float]:
        return value, min(max(value, least), most)

    ended = "scalellm_tokenizer_requests_ended_total"
    return {
        "requests came": within(of_edge("tokenizer_requests_accepted_total"), seen.sent - seen.perhaps_lost, seen.sent),
        "requests submitted or refused": within(
            of_edge("tokenizer_requests_submitted_total"),
            seen.sent - seen.invalid - seen.perhaps_lost,
            seen.sent - seen.invalid,
        ),
        "requests went on": (of_edge("tokenizer_requests_submitted_total"), of_core("requests_accepted_total")),
        "requests dispatched": (of_core("dispatches_total"), of_engines("requests_accepted_total")),
        "requests finished": (total(edge, ended, 'code="OK"'), seen.finished),
        # A client's deadline reaches the edge as the one or the other, whichever timer is first.
        "requests cancelled or late": within(
            total(edge, ended, 'outcome="cancelled"'),
            seen.cancelled + seen.late - seen.perhaps_lost,
            seen.cancelled + seen.late,
        ),
        "requests wrong": (total(edge, ended, 'code="INVALID_ARGUMENT"'), seen.invalid),
        "tokens received": (of_engines("generation_tokens_total"), of_core("tokens_received_total")),
        "tokens passed on": (
            of_core("tokens_received_total"),
            of_core("tokens_sent_total") + of_core("tokens_dropped_total"),
        ),
        "tokens arrived": (
            of_core("tokens_sent_total"),
            of_edge("generation_tokens_total") + of_edge("tokenizer_tokens_discarded_total"),
        ),
        "prompt tokens": (of_edge("prompt_tokens_total"), seen.prompt_tokens),
        "first tokens": within(
            of_edge("time_to_first_token_seconds_count"),
            seen.with_first_token,
            seen.with_first_token + seen.perhaps_with_first_token,
        ),
        "end-to-end latencies": (of_edge("e2e_request_latency_seconds_count"), seen.finished),
        "tokens of finished requests": (of_edge("request_generation_tokens_sum"), seen.completion_tokens),
        "steps observed": (of_engines("steps_total"), of_engines("step_seconds_count")),
        "tokens computed": (of_engines("computed_tokens_total"), of_engines("step_tokens_sum")),
        "bytes from the scheduler": (
            core['scalellm_scheduler_link_bytes_total{direction="sent",executor="",peer="tokenizer"}'],
            edge['scalellm_tokenizer_link_bytes_total{direction="received"}'],
        ),
        "bytes from the executors": (
            total(core, "scalellm_scheduler_link_bytes_total", 'direction="received"', 'peer="executor"'),
            sum(engine['scalellm_executor_link_bytes_total{direction="sent"}'] for engine in engines),
        ),
    }
