"""An executor leaves while it streams: what does not end within its drain limit goes on elsewhere, unharmed."""

from __future__ import annotations

import asyncio

import grpc

from line import Answer, Line, generate, scrape, start_line
from prompts import PROMPTS
from scalellm.v1 import common_pb2, generation_pb2
from service_processes import PATIENCE, Spawn, eventually

NUM_REQUESTS = 6


def request(number: int) -> generation_pb2.GenerateRequest:
    return generation_pb2.GenerateRequest(
        prompt=PROMPTS[number],
        sampling=common_pb2.SamplingParams(max_tokens=800, seed=number + 1, ignore_eos=True, n=1 + number % 2),
        output=generation_pb2.OUTPUT_TEXT_AND_TOKEN_IDS,
    )


async def test_what_runs_beyond_the_drain_limit_goes_on_elsewhere(spawn: Spawn, redis, model_dir) -> None:
    fake = ("--engine", "fake", "--fake-preset", "h200-llama-8b", "--max-model-len", "2048", "--num-blocks", "4096")
    line: Line = start_line(
        spawn,
        redis,
        model_dir("smollm2-135m-instruct"),
        executors=[(*fake, "--drain-limit-s", "0.5")] * 2,
        scheduler=("--max-executor-deaths", "1"),  # a death would end the request that it befalls
    )
    async with line.channel() as channel:
        undisturbed = await asyncio.gather(*(generate(channel, request(number)) for number in range(NUM_REQUESTS)))
        seen = [Answer() for _ in range(NUM_REQUESTS)]
        running = [
            asyncio.create_task(generate(channel, request(number), answer=answer)) for number, answer in enumerate(seen)
        ]
        await eventually(lambda: all(answer.token_ids for answer in seen))
        assert await asyncio.to_thread(line.executors[0].terminate, PATIENCE) == 0
        disturbed = await asyncio.gather(*running)
    assert "go on elsewhere" in line.executors[0].log.read_text()
    for before, after in zip(undisturbed, disturbed, strict=True):
        assert after.code is grpc.StatusCode.OK, after.details
        assert after.token_ids == before.token_ids
        assert after.texts == before.texts
    assert sum(answer.finished.usage.num_resumed > 0 for answer in disturbed) > 0
    state = await line.scheduler_state()
    assert state.accepted == state.finished == 2 * NUM_REQUESTS
    async with asyncio.timeout(PATIENCE):
        while (info := await line.executor_info(1)).load.running:
            await asyncio.sleep(0.05)
    assert info.load.free_blocks == info.load.total_blocks
    assert scrape(line.executors[1])['scalellm_executor_requests_total{outcome="cancelled"}'] == 0
