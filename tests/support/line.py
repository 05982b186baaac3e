"""The whole line as real processes, and clients that drive it."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol
from urllib.request import urlopen

import grpc
from prometheus_client.parser import text_string_to_metric_families

from scalellm.v1 import (
    common_pb2,
    executor_pb2,
    executor_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    scheduler_pb2,
    scheduler_pb2_grpc,
)
from service_processes import PATIENCE, RedisProcess, ServiceProcess, Spawn, pause_since


@dataclass
class Line:
    """Redis, executors, scheduler and tokenizer, all running."""

    redis: RedisProcess
    executors: list[ServiceProcess]
    scheduler: ServiceProcess
    tokenizer: ServiceProcess
    num_models: int = 1

    @property
    def address(self) -> str:
        return self.tokenizer.address

    def channel(self) -> grpc.aio.Channel:
        # A connection of its own: with SO_REUSEPORT each connection may meet another worker.
        return grpc.aio.insecure_channel(self.address, options=[("grpc.use_local_subchannel_pool", 1)])

    def wait_linked(self) -> None:
        """Wait for all links: a request waits for its worker's, but not for as long as a busy machine may take."""
        num_workers = sum(
            "scalellm.services.tokenizer.worker" in child.cmdline() for child in self.tokenizer.children()
        )
        wanted = {"tokenizer": num_workers * self.num_models, "executor": len(self.executors)}
        deadline = time.monotonic() + PATIENCE
        while True:
            began = time.monotonic()
            found = scrape(self.scheduler)
            if {peer: found[f'scalellm_scheduler_links{{peer="{peer}"}}'] for peer in wanted} == wanted:
                return
            assert time.monotonic() < deadline, self.scheduler.log.read_text() + self.tokenizer.log.read_text()
            time.sleep(pause_since(began))

    async def scheduler_state(self) -> scheduler_pb2.GetStateResponse:
        async with grpc.aio.insecure_channel(self.scheduler.address) as channel:
            return await scheduler_pb2_grpc.SchedulerStub(channel).GetState(scheduler_pb2.GetStateRequest())

    async def executor_info(self, number: int = 0) -> executor_pb2.GetExecutorInfoResponse:
        async with grpc.aio.insecure_channel(self.executors[number].address) as channel:
            return await executor_pb2_grpc.ExecutorStub(channel).GetInfo(executor_pb2.GetExecutorInfoRequest())


def start_line(
    spawn: Spawn,
    redis: RedisProcess,
    model: Path,
    *,
    executors: Sequence[Sequence[str]] = ((),),
    scheduler: Sequence[str] = (),
    tokenizer: Sequence[str] = (),
    num_models: int = 1,
) -> Line:
    """Start everything; each of `executors` is one executor's extra flags."""
    running = [
        spawn("executor", "--model", str(model), "--metrics-port", "0", *flags, wait=False) for flags in executors
    ]
    for executor in running:
        executor.wait_ready()
    addresses = ",".join(executor.address for executor in running)
    core = spawn("scheduler", "--executors", addresses, "--redis-url", redis.url, "--metrics-port", "0", *scheduler)
    edge = spawn(
        "tokenizer",
        *("--scheduler", core.address, "--model", str(model), "--redis-url", redis.url, "--metrics-port", "0"),
        *tokenizer,
    )
    line = Line(redis, running, core, edge, num_models)
    line.wait_linked()
    return line


@dataclass
class Answer:
    """Answer to one Generate call."""

    started: generation_pb2.Started | None = None
    finished: generation_pb2.Finished | None = None
    texts: dict[int, str] = field(default_factory=lambda: defaultdict(str))
    token_ids: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    likeliest: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    """The first alternative of each token whose log-probability came."""
    prompt_likeliest: list[int] = field(default_factory=list)
    """The first alternative of each token of the prompt."""
    ends: dict[int, generation_pb2.SampleFinished] = field(default_factory=dict)
    """Ends of the samples, as the last Delta of each told."""
    code: grpc.StatusCode | None = None
    details: str = ""
    trailers: dict[str, str | bytes] = field(default_factory=dict)

    @property
    def text(self) -> str:
        return self.texts[0]


async def generate(
    channel: grpc.aio.Channel,
    request: generation_pb2.GenerateRequest,
    *,
    answer: Answer | None = None,
    **call_options,
) -> Answer:
    """Run one request to its end, whatever the end is; checks the stream's shape on the way.

    Whoever gives the `answer` can see what has come so far.
    """
    call = generation_pb2_grpc.GenerationStub(channel).Generate(request, **call_options)
    answer = answer or Answer()
    try:
        async for response in call:
            assert answer.finished is None, "something came after Finished"
            match response.WhichOneof("event"):
                case "started":
                    assert answer.started is None
                    answer.started = response.started
                case "delta":
                    delta = response.delta
                    assert delta.index not in answer.ends, "something came after the end of a sample"
                    if delta.HasField("finished"):
                        answer.ends[delta.index] = delta.finished
                    ids = answer.token_ids[delta.index]
                    if delta.token_ids:
                        assert delta.offset == len(ids), "a token is missing or came twice"
                        assert delta.num_tokens == len(delta.token_ids)
                    ids.extend(delta.token_ids)
                    answer.texts[delta.index] += delta.text
                    answer.likeliest[delta.index] += _likeliest(delta.logprobs)
                case "prompt_logprobs":
                    assert response.prompt_logprobs.offset == len(answer.prompt_likeliest)
                    answer.prompt_likeliest += _likeliest(response.prompt_logprobs.logprobs)
                case "finished":
                    answer.finished = response.finished
                    told = [answer.ends.get(sample.index) for sample in answer.finished.samples]
                    assert told == list(answer.finished.samples), "an end was not told with the last tokens"
        answer.code = grpc.StatusCode.OK
        assert answer.finished is not None, "OK without Finished"
    except grpc.aio.AioRpcError as error:
        answer.code, answer.details = error.code(), error.details() or ""
        answer.trailers = dict(error.trailing_metadata() or ())
        # The client's own timer may fire between the last message and the status.
        late = answer.code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert answer.finished is None or late, "Finished and a status other than OK"
    else:
        answer.trailers = dict(await call.trailing_metadata())
    return answer


def _likeliest(values: common_pb2.TokenLogprobs) -> list[int]:
    assert len(values.top_token_ids) == values.num_top * len(values.logprobs)
    return list(values.top_token_ids[:: values.num_top or 1])


class Scraped(Protocol):
    """A service with metrics."""

    @property
    def metrics_address(self) -> str:
        """host:port."""


def scrape(service: Scraped) -> dict[str, float]:
    """All samples of a service's metrics, by name with labels, such as `x_total{outcome="finished"}`."""
    with urlopen(f"http://{service.metrics_address}/metrics", timeout=PATIENCE) as answer:
        text = answer.read().decode()
    samples: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f'{key}="{value}"' for key, value in sorted(sample.labels.items()))
            samples[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return samples
