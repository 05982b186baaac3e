"""A scheduler is lost while its requests stream: clients see a pause, not an error, and the very same answers."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass

import grpc
import pytest

from line import Answer, Line, generate, scrape
from scalellm.v1 import common_pb2, generation_pb2
from service_processes import PATIENCE, ServiceProcess, Spawn, eventually

FAKE = ("--engine", "fake", "--fake-preset", "h200-llama-8b", "--max-model-len", "2048", "--num-blocks", "2048")
NUM_REQUESTS = 8
LENGTH = 400


@dataclass
class Core:
    """Schedulers and what they stand between."""

    line: Line
    schedulers: list[ServiceProcess]
    start: Callable[[int], ServiceProcess]


def start_core(spawn: Spawn, redis, model, tokenizer: tuple[str, ...]) -> Core:
    executors = [spawn("executor", "--model", str(model), *FAKE, wait=False) for _ in range(2)]
    addresses = ",".join(executor.wait_ready().address for executor in executors)
    flags = ("--executors", addresses, "--redis-url", redis.url, "--metrics-port", "0", "--drain-limit-s", "0.2")

    def start(port: int = 0) -> ServiceProcess:
        return spawn("scheduler", "--port", str(port), *flags)

    schedulers = [start(), start()]
    edge = spawn(
        "tokenizer",
        *("--scheduler", ",".join(scheduler.address for scheduler in schedulers), "--model", str(model)),
        *("--redis-url", redis.url, "--metrics-port", "0", "--workers", "1", *tokenizer),
    )
    core = Core(Line(redis, executors, schedulers[0], edge), schedulers, start)
    for scheduler in schedulers:
        core.line.scheduler = scheduler
        core.line.wait_linked()
    return core


def request(number: int, run: str, stop: str = "") -> generation_pb2.GenerateRequest:
    """Return a request, its kind by its number; the same number in another run gives the same but for the session."""
    kind = number % 4
    return generation_pb2.GenerateRequest(
        chat=generation_pb2.Chat(messages=[generation_pb2.ChatMessage(role="user", content=f"Tell me of {number}.")]),
        sampling=common_pb2.SamplingParams(
            max_tokens=LENGTH,
            seed=number,
            ignore_eos=True,
            n=3 if kind == 1 else 1,
            logprobs=1 if kind in (1, 2) else None,
            prompt_logprobs=1 if kind == 2 else None,
        ),
        session_id=f"{run}-{number}" if kind == 3 else None,
        stop=[stop] if stop else [],
        cache_salt=str(number),  # else all of them belong on one scheduler
        output=generation_pb2.OUTPUT_TEXT_AND_TOKEN_IDS,
    )


async def kill_and_restart(core: Core) -> None:
    (victim,) = core.schedulers
    port = int(victim.address.rpartition(":")[2])
    victim.kill_tree()
    core.schedulers = [await asyncio.to_thread(core.start, port)]


async def kill_one(core: Core) -> None:
    core.schedulers.pop(0).kill_tree()


async def drain_and_restart(core: Core) -> None:
    (victim,) = core.schedulers
    port = int(victim.address.rpartition(":")[2])
    assert await asyncio.to_thread(victim.terminate) == 0
    core.schedulers = [await asyncio.to_thread(core.start, port)]


async def drain_one(core: Core) -> None:
    assert await asyncio.to_thread(core.schedulers.pop(0).terminate) == 0


async def stop_one(core: Core) -> None:
    os.kill(core.schedulers.pop(0).pid, signal.SIGSTOP)  # it stays that way: what it had must move


@pytest.mark.parametrize(
    "losses",
    [
        (drain_one, kill_and_restart),
        pytest.param((kill_one, drain_and_restart), marks=pytest.mark.slow),
        pytest.param((stop_one,), marks=pytest.mark.slow),
    ],
    ids=lambda losses: "-".join(fault.__name__ for fault in losses),
)
async def test_a_lost_scheduler_costs_no_answer(spawn: Spawn, redis, model_dir, losses) -> None:
    """One of two schedulers is lost; then the remaining one is lost as well, with every request that runs on it."""
    # A stopped scheduler is taken for dead after the stall limit; on a busy machine others are slow, too.
    limits = ("--stall-limit-s", "5" if stop_one in losses else "60", "--scheduler-outage-s", str(PATIENCE))
    core = await asyncio.to_thread(start_core, spawn, redis, model_dir("smollm2-135m-instruct"), limits)
    line = core.line
    async with line.channel() as channel:
        plain = [await generate(channel, request(number, "plain")) for number in (0, 4)]
        stops = {
            number: answer.text[len(answer.text) // 2 :][:12] for number, answer in zip((0, 4), plain, strict=True)
        }

        def make(number: int, run: str) -> generation_pb2.GenerateRequest:
            return request(number, run, stops.get(number, ""))

        undisturbed = await asyncio.gather(*(generate(channel, make(n, "before")) for n in range(NUM_REQUESTS)))
        assert all(undisturbed[number].finished.samples[0].stop == stop for number, stop in stops.items())
        num_moved = 0
        for fault in losses:
            seen = [Answer() for _ in range(NUM_REQUESTS)]
            running = [
                asyncio.create_task(generate(channel, make(number, fault.__name__), answer=answer))
                for number, answer in enumerate(seen)
            ]
            await eventually(lambda seen=seen: all(answer.token_ids for answer in seen))
            await fault(core)
            num_moved += check_moved(undisturbed, await asyncio.gather(*running))
    # A worker's counts are written twice a second.
    counter = "scalellm_tokenizer_requests_resubmitted_total"
    await eventually(
        lambda: sum(value for name, value in scrape(line.tokenizer).items() if name.startswith(counter)) >= num_moved
    )
    for number in range(2):
        async with asyncio.timeout(PATIENCE):
            while (load := (await line.executor_info(number)).load).running or load.free_blocks != load.total_blocks:
                await asyncio.sleep(0.05)


def check_moved(undisturbed: list[Answer], disturbed: list[Answer]) -> int:
    """All are answered as without the fault; returns how many of them went on on another scheduler."""
    for before, after in zip(undisturbed, disturbed, strict=True):
        assert after.code is grpc.StatusCode.OK, after.details
        assert after.texts == before.texts
        assert after.token_ids == before.token_ids
        assert after.likeliest == before.likeliest
        assert after.prompt_likeliest == before.prompt_likeliest
        assert list(after.finished.samples) == list(before.finished.samples)
        assert after.finished.usage.completion_tokens == before.finished.usage.completion_tokens
        assert after.finished.session == before.finished.session
        latency = after.finished.latency
        parts = (latency.session_ns, latency.tokenize_ns, latency.admission_ns, latency.queue_ns, latency.prefill_ns)
        rest = (latency.decode_ns, latency.failover_ns, latency.detokenize_ns, latency.network_ns)
        assert sum(parts) + sum(rest) == latency.total_ns
    moved = [answer for answer in disturbed if answer.finished.latency.failover_ns > 0]
    assert moved
    assert any(answer.finished.usage.num_resumed > 0 for answer in moved)
    return len(moved)
