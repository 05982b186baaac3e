"""An executor dies while it streams: the client sees a pause, not an error, and the very same tokens."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import grpc
import pytest

from engine_alone import answers_alone
from line import Answer, Line, generate, start_line
from prompts import PROMPTS
from scalellm.services.executor.config import ExecutorSettings
from scalellm.services.executor.engine.sampling_params import SamplingParams
from scalellm.v1 import common_pb2, generation_pb2
from service_processes import PATIENCE, Spawn, eventually

NUM_REQUESTS = 8
FAKE = ("--engine", "fake", "--max-model-len", "2048", "--num-blocks", "1024", "--fake-preset", "h200-llama-8b")


@pytest.fixture(scope="module")
def fake_line(module_spawn: Spawn, module_redis, model_dir) -> Line:
    """One executor, and a scheduler that does not wait for it when nobody answers."""
    model = model_dir("smollm2-135m-instruct")
    return start_line(module_spawn, module_redis, model, executors=(FAKE,), scheduler=("--executor-grace-s", "0"))


def request(number: int, max_tokens: int = 32, prediction: str | None = None) -> generation_pb2.GenerateRequest:
    return generation_pb2.GenerateRequest(
        prompt=PROMPTS[number],
        prediction=prediction,
        return_prompt_token_ids=True,
        sampling=common_pb2.SamplingParams(
            max_tokens=max_tokens,
            temperature=0 if number % 2 else 0.9,
            seed=number + 1,
            ignore_eos=True,
            n=2 if number == 4 else 1,
        ),
        output=generation_pb2.OUTPUT_TEXT_AND_TOKEN_IDS,
    )


def without_speculation(model: Path, prompts: Sequence[Sequence[int]]) -> list[dict[int, list[int]]]:
    """Tokens of each request's samples by index, from an engine in this process that guesses nothing."""
    settings = ExecutorSettings(model=str(model), num_blocks=256, max_model_len=1024, num_threads=1, speculation="off")
    requests = []
    for number, prompt in enumerate(prompts):
        asked = request(number).sampling
        sampling = SamplingParams(
            max_tokens=asked.max_tokens, temperature=asked.temperature, seed=asked.seed, ignore_eos=True, n=asked.n
        )
        requests.append((prompt, sampling))
    return answers_alone(settings, requests)


async def test_kill_9_of_an_executor_loses_and_repeats_nothing(spawn: Spawn, redis, shallow_model) -> None:
    """Also where guessed tokens are accepted: the answers before are sent along as predictions."""
    flags = ("--num-blocks", "256", "--max-model-len", "1024", "--num-threads", "1")
    line = start_line(spawn, redis, shallow_model, executors=(flags, flags), tokenizer=("--workers", "1"))
    async with line.channel() as channel:
        undisturbed = [await generate(channel, request(number)) for number in range(NUM_REQUESTS)]
        assert all(answer.code is grpc.StatusCode.OK for answer in undisturbed)
        predicted = [request(number, prediction=answer.text) for number, answer in enumerate(undisturbed)]
        guessed = [await generate(channel, each) for each in predicted]
        assert [answer.token_ids for answer in guessed] == [answer.token_ids for answer in undisturbed]
        assert sum(answer.finished.usage.accepted_prediction_tokens for answer in guessed) > 0

        seen = [Answer() for _ in range(NUM_REQUESTS)]
        running = [
            asyncio.create_task(generate(channel, each, answer=answer))
            for each, answer in zip(predicted, seen, strict=True)
        ]
        # Half of them run on the victim, and each has some of its tokens.
        await eventually(lambda: all(answer.token_ids for answer in seen))
        victim = line.executors[0]
        family = [*[child.pid for child in victim.children()], victim.pid]
        for pid in reversed(family):
            os.kill(pid, signal.SIGKILL)
        disturbed = await asyncio.gather(*running)

    for before, after in zip(undisturbed, disturbed, strict=True):
        assert after.code is grpc.StatusCode.OK, after.details
        assert after.token_ids == before.token_ids
        assert after.texts == before.texts
    moved = [answer for answer in disturbed if answer.finished.latency.failover_ns > 0]
    assert moved
    assert any(answer.finished.usage.num_resumed > 0 for answer in moved)
    state = await line.scheduler_state()
    assert state.resubmitted == len(moved)
    assert state.running == state.queued == 0
    assert state.accepted == state.finished == 3 * NUM_REQUESTS
    async with asyncio.timeout(PATIENCE):
        while (info := await line.executor_info(1)).load.running:
            await asyncio.sleep(0.05)
    assert info.load.free_blocks == info.load.total_blocks
    alone = without_speculation(shallow_model, [answer.started.prompt_token_ids for answer in undisturbed])
    assert [dict(answer.token_ids) for answer in disturbed] == alone


async def test_the_requests_of_the_only_executor_wait_while_its_engine_starts_again(fake_line: Line) -> None:
    """However short the grace: the front answers, and says that there will be an engine."""
    line = fake_line
    async with line.channel() as channel:
        undisturbed = [await generate(channel, request(number)) for number in range(NUM_REQUESTS)]
        seen = [Answer() for _ in range(NUM_REQUESTS)]
        running = [
            asyncio.create_task(generate(channel, request(number), answer=answer)) for number, answer in enumerate(seen)
        ]
        await eventually(lambda: any(answer.token_ids for answer in seen))
        (engine,) = line.executors[0].children()
        engine.kill()
        late = asyncio.create_task(generate(channel, request(0)))
        disturbed = await asyncio.gather(*running)
        disturbed.append(await late)
        undisturbed.append(undisturbed[0])
    for before, after in zip(undisturbed, disturbed, strict=True):
        assert after.code is grpc.StatusCode.OK, after.details
        assert after.token_ids == before.token_ids
    state = await line.scheduler_state()
    assert state.resubmitted > 0
    assert state.running == state.queued == 0


async def test_without_any_executor_requests_end_promptly(fake_line: Line) -> None:
    """The last of the file: it ends the executor."""
    line = fake_line
    async with line.channel() as channel:
        # Long enough to be running still when the last executor is gone, however fast they are.
        running = asyncio.create_task(generate(channel, request(1, max_tokens=900)))
        async with asyncio.timeout(PATIENCE):
            while (await line.scheduler_state()).running == 0:
                assert not running.done(), running.result().details
                await asyncio.sleep(0.02)
        for executor in line.executors:
            executor.kill_tree()
        answer = await asyncio.wait_for(running, PATIENCE)
        assert answer.code is grpc.StatusCode.UNAVAILABLE
        later = await asyncio.wait_for(generate(channel, request(2)), PATIENCE)
        assert later.code is grpc.StatusCode.UNAVAILABLE
