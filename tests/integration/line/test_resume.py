"""A tokenizer dies while it streams what is to be kept: another one goes on, through the same scheduler."""

from __future__ import annotations

import asyncio

import grpc

from line import Answer, generate, start_line
from scalellm.v1 import common_pb2, generation_pb2, generation_pb2_grpc
from service_processes import PATIENCE, eventually

FAKE = ("--engine", "fake", "--max-model-len", "2048", "--num-blocks", "1024", "--fake-preset", "h200-llama-8b")
KEEP = generation_pb2.ON_DISCONNECT_KEEP


async def test_another_tokenizer_goes_on_with_the_very_same_tokens(spawn, redis, model_dir) -> None:
    model = model_dir("smollm2-135m-instruct")
    line = start_line(spawn, redis, model, executors=(FAKE,), tokenizer=("--workers", "1"))
    other = spawn(
        "tokenizer",
        *("--scheduler", line.scheduler.address, "--model", str(model), "--redis-url", redis.url, "--workers", "1"),
    )
    request = generation_pb2.GenerateRequest(
        prompt="Once upon a time",
        sampling=common_pb2.SamplingParams(max_tokens=300, seed=3, n=2, ignore_eos=True),
        output=generation_pb2.OUTPUT_TEXT_AND_TOKEN_IDS,
    )
    async with line.channel() as channel:
        undisturbed = await generate(channel, request)
        request.request_id, request.on_disconnect = "kept", KEEP
        seen = Answer()
        running = asyncio.create_task(generate(channel, request, answer=seen))
        await eventually(lambda: len(seen.token_ids[0]) > 20)
        line.tokenizer.kill_tree()
        await running
        assert seen.code is grpc.StatusCode.UNAVAILABLE

    async with grpc.aio.insecure_channel(other.address) as channel:
        resume = generation_pb2.ResumeRequest(
            request_id="kept", offsets=[len(seen.token_ids[index]) for index in range(2)]
        )
        stub = generation_pb2_grpc.GenerationStub(channel)
        async for response in stub.Resume(resume, timeout=PATIENCE, wait_for_ready=True):
            if response.HasField("delta"):
                delta = response.delta
                assert delta.offset == len(seen.token_ids[delta.index]), "a token is missing or came twice"
                seen.token_ids[delta.index].extend(delta.token_ids)
                seen.texts[delta.index] += delta.text
                assert delta.index not in seen.ends
                if delta.HasField("finished"):
                    seen.ends[delta.index] = delta.finished
            elif response.HasField("finished"):
                seen.finished = response.finished
    assert undisturbed.code is grpc.StatusCode.OK
    assert seen.token_ids == undisturbed.token_ids
    assert seen.texts == undisturbed.texts
    assert list(seen.finished.samples) == list(undisturbed.finished.samples)
    assert seen.ends == undisturbed.ends
    assert seen.finished.usage.completion_tokens == undisturbed.finished.usage.completion_tokens
    assert seen.finished.usage.num_resumed > 0
    state = await line.scheduler_state()
    assert state.running == state.queued == 0
