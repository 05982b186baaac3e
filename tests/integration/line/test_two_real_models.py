"""SmolLM2 and Gemma 3 behind one address: their texts are those of lines of their own, also when one is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from line import Answer, Line, generate
from scalellm.v1 import common_pb2, generation_pb2
from service_processes import PATIENCE, RedisProcess, ServiceProcess, Spawn

pytestmark = pytest.mark.slow

SMOLLM, GEMMA = "smollm2-135m-instruct", "gemma3-270m"
PROMPTS = ("The rivers of Europe are", "def fibonacci(n):")


def request(model: str, prompt: str, max_tokens: int = 24, temperature: float = 0.0) -> generation_pb2.GenerateRequest:
    sampling = common_pb2.SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=7, ignore_eos=True)
    return generation_pb2.GenerateRequest(
        model=model, prompt=prompt, sampling=sampling, output=generation_pb2.OUTPUT_TEXT_AND_TOKEN_IDS
    )


async def answers(line: Line, name: str) -> list[tuple[str, list[int]]]:
    """The texts and tokens of a model, of requests that run side by side: greedy ones, and drawn ones."""
    async with line.channel() as channel:
        asked = [request(name, prompt, temperature=temperature) for prompt in PROMPTS for temperature in (0.0, 0.8)]
        given = await asyncio.gather(*(generate(channel, one) for one in asked))
    for answer in given:
        assert answer.started is not None, answer.details
        assert answer.started.model == name
    return [(answer.text, answer.token_ids[0]) for answer in given]


async def test_texts_are_those_of_lines_of_their_own_and_one_outlives_the_other(
    spawn: Spawn, redis: RedisProcess, model_dir: Callable[[str], Path]
) -> None:
    models = {name: model_dir(name) for name in (SMOLLM, GEMMA)}
    room = ("--num-blocks", "256", "--num-threads", "1")
    executors = [spawn("executor", "--model", str(path), *room, wait=False) for path in models.values()]
    for executor in executors:
        executor.wait_ready()

    def line_of(served: list[ServiceProcess], *model: str) -> Line:
        links = ("--redis-url", redis.url, "--metrics-port", "0")
        addresses = ",".join(executor.address for executor in served)
        core = spawn("scheduler", "--executors", addresses, "--executor-grace-s", "1", *links)
        edge = spawn("tokenizer", "--workers", "1", "--scheduler", core.address, *links, "--model", *model)
        line = Line(redis, served, core, edge, len(served))
        line.wait_linked()
        return line

    alone = {}
    for executor, (name, path) in zip(executors, models.items(), strict=True):
        line = line_of([executor], str(path))
        alone[name] = await answers(line, name)
        assert line.tokenizer.terminate() == 0
        assert line.scheduler.terminate() == 0
    line = line_of(executors, ",".join(f"{name}={path}" for name, path in models.items()))
    together = await asyncio.gather(*(answers(line, name) for name in models))
    assert dict(zip(models, together, strict=True)) == alone
    assert alone[SMOLLM] != alone[GEMMA]

    async with line.channel() as channel:
        undisturbed = await generate(channel, request(SMOLLM, PROMPTS[0], 96))
        assert len(undisturbed.token_ids[0]) == 96, undisturbed.details
        going, leaving = Answer(), Answer()
        running = asyncio.create_task(generate(channel, request(SMOLLM, PROMPTS[0], 96), answer=going))
        lost = asyncio.create_task(generate(channel, request(GEMMA, PROMPTS[0], 1000), answer=leaving))
        async with asyncio.timeout(PATIENCE):
            while not (going.token_ids and leaving.token_ids):
                assert not running.done()
                assert not lost.done()
                await asyncio.sleep(0.01)
        executors[1].kill_tree()
        assert (await running).token_ids == undisturbed.token_ids
        assert (await lost).code is grpc.StatusCode.UNAVAILABLE
        assert GEMMA in leaving.details
