"""Services restart and end: sessions survive the scheduler, SIGTERM drains, nothing is left behind."""

from __future__ import annotations

import asyncio

import grpc
import psutil
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


async def test_a_session_survives_the_schedulers_restart_and_its_executor_is_found_again(
    spawn: Spawn, redis, model_dir
) -> None:
    model = model_dir("smollm2-135m-instruct")
    line = start_line(spawn, redis, model, executors=(FAKE, FAKE))
    async with line.channel() as channel:
        first = await generate(channel, request(40, session_id="s"))
        assert first.finished.session == generation_pb2.SESSION_OUTCOME_SAVED
        port = line.scheduler.address.rpartition(":")[2]
        assert await asyncio.to_thread(line.scheduler.terminate) == 0
        addresses = ",".join(executor.address for executor in line.executors)
        line.scheduler = spawn(
            "scheduler", "--port", port, "--executors", addresses, "--redis-url", redis.url, "--metrics-port", "0"
        )
        async with asyncio.timeout(PATIENCE):
            while (second := await generate(channel, request(40, session_id="s"))).code is grpc.StatusCode.UNAVAILABLE:
                await asyncio.sleep(0.1)
    assert second.code is grpc.StatusCode.OK, second.details
    assert second.started.session_turns == 1
    assert second.finished.latency.executor_id == first.finished.latency.executor_id
    usage = second.finished.usage
    assert usage.cached_tokens >= (first.finished.usage.prompt_tokens + 39) // 16 * 16
    with redis_client.Redis.from_url(redis.url) as client:
        keys = list(client.scan_iter("*"))
        assert keys
        assert all(client.ttl(key) > 0 for key in keys), "a key without a time-to-live"


async def test_sigterm_drains_each_service_and_leaves_nothing(spawn: Spawn, redis, model_dir) -> None:
    line = start_line(spawn, redis, model_dir("smollm2-135m-instruct"), executors=(FAKE,))
    async with line.channel() as channel:
        running = [asyncio.create_task(generate(channel, request(300))) for _ in range(4)]
        async with asyncio.timeout(PATIENCE):
            while (await line.executor_info()).accepted < 4:
                await asyncio.sleep(0.02)
        services = [line.tokenizer, line.scheduler, *line.executors]
        children = [child for service in services for child in service.children()]
        line.tokenizer.process.terminate()
        answers = await asyncio.gather(*running)
        assert [answer.code for answer in answers] == [grpc.StatusCode.OK] * 4
        assert all(answer.finished.usage.completion_tokens == 300 for answer in answers)
    assert await asyncio.to_thread(line.tokenizer.process.wait, PATIENCE) == 0
    assert await asyncio.to_thread(line.scheduler.terminate) == 0
    assert await asyncio.to_thread(line.executors[0].terminate) == 0
    await eventually(lambda: not any(is_alive(child) for child in children))
    assert not any(service.announce.exists() for service in services)


async def test_work_moves_when_an_executor_drains(spawn: Spawn, redis, model_dir) -> None:
    model = model_dir("smollm2-135m-instruct")
    line: Line = start_line(spawn, redis, model, executors=(FAKE, (*FAKE, "--drain-limit-s", "0.2")))
    async with line.channel() as channel:
        running = [asyncio.create_task(generate(channel, request(1000))) for _ in range(6)]
        async with asyncio.timeout(PATIENCE):
            while (await line.executor_info(1)).load.running < 2:
                await asyncio.sleep(0.02)
        assert await asyncio.to_thread(line.executors[1].terminate) == 0
        answers = await asyncio.gather(*running)
        assert [answer.code for answer in answers] == [grpc.StatusCode.OK] * 6
        assert all(answer.finished.usage.completion_tokens == 1000 for answer in answers)
        assert any(answer.finished.usage.num_resumed for answer in answers)
