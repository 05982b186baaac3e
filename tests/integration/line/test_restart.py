"""Services restart and end: sessions survive the scheduler, SIGTERM drains, nothing is left behind."""

from __future__ import annotations

import asyncio

import grpc
import psutil
import pytest
import redis as redis_client

from line import Line, generate, start_line
from scalellm.v1 import common_pb2, generation_pb2
from service_processes import PATIENCE, Spawn, eventually

FAKE = ("--engine", "fake", "--max-model-len", "2048", "--num-blocks", "1024", "--fake-preset", "h200-llama-8b")


def request(max_tokens: int, **fields) -> generation_pb2.GenerateRequest:
    messages = [generation_pb2.ChatMessage(role="user", content="Hello there, how are you today?")]
    return generation_pb2.GenerateRequest(
        chat=generation_pb2.Chat(messages=messages),
        sampling=common_pb2.SamplingParams(max_tokens=max_tokens, ignore_eos=True),
        **fields,
    )


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(scope="module")
def line(module_spawn: Spawn, module_redis, model_dir) -> Line:
    return start_line(module_spawn, module_redis, model_dir("smollm2-135m-instruct"), executors=(FAKE, FAKE))


async def test_a_session_survives_the_schedulers_restart_and_its_executor_is_found_again(
    line: Line, module_spawn: Spawn
) -> None:
    async with line.channel() as channel:
        first = await generate(channel, request(40, session_id="s"))
        assert first.finished.session == generation_pb2.SESSION_OUTCOME_SAVED
        port = line.scheduler.address.rpartition(":")[2]
        assert await asyncio.to_thread(line.scheduler.terminate) == 0
        addresses = ",".join(executor.address for executor in line.executors)
        line.scheduler = module_spawn(
            "scheduler", "--port", port, "--executors", addresses, "--redis-url", line.redis.url, "--metrics-port", "0"
        )
        async with asyncio.timeout(PATIENCE):
            while (second := await generate(channel, request(40, session_id="s"))).code is grpc.StatusCode.UNAVAILABLE:
                await asyncio.sleep(0.1)
    assert second.code is grpc.StatusCode.OK, second.details
    assert second.started.session_turns == 1
    assert second.finished.latency.executor_id == first.finished.latency.executor_id
    usage = second.finished.usage
    assert usage.cached_tokens >= (first.finished.usage.prompt_tokens + 39) // 16 * 16
    with redis_client.Redis.from_url(line.redis.url) as client:
        keys = list(client.scan_iter("*"))
        assert keys
        assert all(client.ttl(key) > 0 for key in keys), "a key without a time-to-live"


async def test_sigterm_drains_each_service_and_leaves_nothing(line: Line) -> None:
    """The last of the file: it ends the line."""
    line.wait_linked()
    async with line.channel() as channel:
        accepted = (await line.scheduler_state()).accepted
        running = [asyncio.create_task(generate(channel, request(300))) for _ in range(4)]
        async with asyncio.timeout(PATIENCE):
            while (await line.scheduler_state()).accepted < accepted + 4:
                await asyncio.sleep(0.02)
        services = [line.tokenizer, line.scheduler, *line.executors]
        children = [child for service in services for child in service.children()]
        line.tokenizer.process.terminate()
        answers = await asyncio.gather(*running)
        assert [answer.code for answer in answers] == [grpc.StatusCode.OK] * 4
        assert all(answer.finished.usage.completion_tokens == 300 for answer in answers)
    assert await asyncio.to_thread(line.tokenizer.process.wait, PATIENCE) == 0
    assert await asyncio.to_thread(line.scheduler.terminate) == 0
    for executor in line.executors:
        assert await asyncio.to_thread(executor.terminate) == 0
    await eventually(lambda: not any(is_alive(child) for child in children))
    assert not any(service.announce.exists() for service in services)
