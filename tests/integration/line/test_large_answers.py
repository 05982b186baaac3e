"""No message to a client is larger than gRPC clients take by default, however much it has asked for."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from line import Line, start_line
from scalellm.services.tokenizer.limits import MAX_ANSWER_BYTES, MAX_ANSWER_TOKENS
from scalellm.v1 import common_pb2, generation_pb2, generation_pb2_grpc, tokenizer_pb2, tokenizer_pb2_grpc
from service_processes import PATIENCE, Spawn

CONTEXT = 65_536
FAKE = ("--engine", "fake", "--max-model-len", str(CONTEXT), "--num-blocks", "8192", "--max-num-batched-tokens", "8192")


@pytest.fixture(scope="module")
def line(module_spawn: Spawn, module_redis, model_dir) -> Line:
    model = model_dir("smollm2-135m-instruct")
    return start_line(module_spawn, module_redis, model, executors=(FAKE,), tokenizer=("--workers", "1"))


async def test_log_probabilities_of_a_long_prompt_come_in_parts(line: Line) -> None:
    ids = [1000 + number % 40_000 for number in range(40_000)]
    request = generation_pb2.GenerateRequest(
        tokens=generation_pb2.TokenIds(ids=ids), sampling=common_pb2.SamplingParams(max_tokens=1, prompt_logprobs=20)
    )
    kinds, told, num_bytes = [], [], 0
    async with line.channel() as channel:
        async for response in generation_pb2_grpc.GenerationStub(channel).Generate(request, timeout=PATIENCE):
            kinds.append(response.WhichOneof("event"))
            if (part := response.prompt_logprobs).token_ids:
                assert part.offset == len(told)
                assert len(part.logprobs.logprobs) == len(part.token_ids)
                assert len(part.logprobs.top_token_ids) == 20 * len(part.token_ids)
                told += part.token_ids
                num_bytes += response.ByteSize()
    assert told == ids
    assert num_bytes > MAX_ANSWER_BYTES, "a single message would have done"
    num_parts = -(-len(ids) // MAX_ANSWER_TOKENS)
    assert kinds == ["started", *["prompt_logprobs"] * num_parts, "delta", "finished"]


@pytest.mark.slow
async def test_what_a_slow_reader_missed_comes_in_parts(line: Line) -> None:
    num_tokens = 45_000
    request = generation_pb2.GenerateRequest(
        prompt="Hi",
        sampling=common_pb2.SamplingParams(max_tokens=num_tokens, logprobs=20, ignore_eos=True),
        output=generation_pb2.OUTPUT_TEXT_AND_TOKEN_IDS,
    )
    finished = (await line.scheduler_state()).finished
    sizes, counts = [], []
    async with line.channel() as channel:
        call = generation_pb2_grpc.GenerationStub(channel).Generate(request, timeout=2 * PATIENCE)
        async with asyncio.timeout(PATIENCE):
            while (await line.scheduler_state()).finished == finished:
                await asyncio.sleep(0.05)
        async for response in call:
            sizes.append(response.ByteSize())
            counts.append(response.delta.num_tokens)
    assert sum(counts) == num_tokens
    assert max(counts) == MAX_ANSWER_TOKENS
    assert max(sizes) < MAX_ANSWER_BYTES < sum(sizes)


async def test_unary_answers_that_would_be_larger_are_refused(line: Line) -> None:
    async with line.channel() as channel:
        stub = tokenizer_pb2_grpc.TokenizerStub(channel)
        text = "once upon a time there was " * 38_000
        encoded = await stub.Encode(tokenizer_pb2.EncodeRequest(text=text), timeout=PATIENCE)
        assert encoded.ByteSize() < MAX_ANSWER_BYTES
        decoded = await stub.Decode(tokenizer_pb2.DecodeRequest(token_ids=encoded.token_ids), timeout=PATIENCE)
        assert decoded.text == text
        spaces = await stub.Encode(tokenizer_pb2.EncodeRequest(text=" " * 400 + "x"), timeout=PATIENCE)
        longest = max(spaces.token_ids, key=lambda id_: len(spaces.tokens[list(spaces.token_ids).index(id_)]))
        call = stub.Decode(tokenizer_pb2.DecodeRequest(token_ids=[longest] * 2**18), timeout=PATIENCE)
        assert await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "a message holds at most 4194304" in await call.details()
