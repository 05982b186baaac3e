"""Sessions, the latency breakdown, seeds and deadlines on the real model, through the whole line."""

from __future__ import annotations

import asyncio
import time

import grpc
import pytest
import torch

from gguf_oracle import load_gguf_oracle
from line import Line, generate, start_line
from scalellm.v1 import (
    common_pb2,
    generation_pb2,
    generation_pb2_grpc,
    sessions_pb2,
    sessions_pb2_grpc,
    tokenizer_pb2,
    tokenizer_pb2_grpc,
)
from service_processes import PATIENCE, Spawn


@pytest.fixture(scope="module")
def line(module_spawn: Spawn, module_redis, model_dir) -> Line:
    flags = ("--num-blocks", "256", "--max-model-len", "1024", "--num-threads", "1", "--quantization", "none")
    return start_line(
        module_spawn,
        module_redis,
        model_dir("smollm2-135m-instruct"),
        executors=(flags,),
        tokenizer=("--workers", "2"),
    )


def chat(*contents: str, **fields) -> generation_pb2.GenerateRequest:
    messages = [generation_pb2.ChatMessage(role="user", content=content) for content in contents]
    sampling = fields.pop("sampling", None) or common_pb2.SamplingParams(max_tokens=20, temperature=0)
    return generation_pb2.GenerateRequest(chat=generation_pb2.Chat(messages=messages), sampling=sampling, **fields)


async def ask(line: Line, request: generation_pb2.GenerateRequest, **options):
    """One request on a connection of its own, so that any worker may serve it."""
    async with line.channel() as channel:
        return await generate(channel, request, **options)


async def test_a_chat_is_answered(line: Line) -> None:
    answer = await ask(line, chat("What is the capital of France?"))
    assert answer.code is grpc.StatusCode.OK, answer.details
    assert "Paris" in answer.text
    assert answer.started.model == "smollm2-135m-instruct"
    assert answer.finished.samples[0].reason in (common_pb2.FINISH_REASON_STOP, common_pb2.FINISH_REASON_LENGTH)


async def test_the_second_turn_computes_only_what_is_new(line: Line) -> None:
    """Across workers (each call has its own connection) and a restart of the scheduler."""
    first = await ask(line, chat("Name three colours of the rainbow.", session_id="colours"))
    assert first.finished.session == generation_pb2.SESSION_OUTCOME_SAVED
    for turn in range(1, 4):
        answer = await ask(line, chat(f"And name {turn} more?", session_id="colours"))
        assert answer.code is grpc.StatusCode.OK, answer.details
        assert answer.started.session_turns == turn
        usage = answer.finished.usage
        new_tokens = usage.prompt_tokens - usage.cached_tokens
        # The answer's last token was never computed, and only whole blocks of 16 are shared.
        assert new_tokens <= 16 + 1 + 16, usage
        assert usage.cached_tokens > first.finished.usage.prompt_tokens // 16 * 16 - 1
    async with line.channel() as channel:
        stub = sessions_pb2_grpc.SessionsStub(channel)
        session = (await stub.Get(sessions_pb2.GetSessionRequest(session_id="colours"))).session
        assert session.num_turns == 4
        assert [message.role for message in session.messages] == ["user", "assistant"] * 4
        await stub.Delete(sessions_pb2.DeleteSessionRequest(session_id="colours"))


async def test_breakdown_adds_up_to_what_the_client_measured(line: Line) -> None:
    for request in (chat("Count to five."), chat("Hi", session_id="breakdown")):
        for _ in range(20):
            started = time.monotonic_ns()
            answer = await ask(line, request)
            measured = time.monotonic_ns() - started
            latency = answer.finished.latency
            # What the client adds is connecting, sending the request and reading the last message, when it is let.
            if measured - latency.total_ns < max(0.25 * measured, 500e6):
                break
        else:
            pytest.fail(f"the client waited for {measured} ns, of which {latency.total_ns} are explained")
        parts = [
            *(latency.session_ns, latency.tokenize_ns, latency.admission_ns, latency.queue_ns, latency.prefill_ns),
            *(latency.decode_ns, latency.failover_ns, latency.detokenize_ns, latency.network_ns),
        ]
        assert sum(parts) == latency.total_ns
        assert 0 < latency.ttft_ns <= latency.total_ns <= measured
        assert latency.prefill_ns > 0
        assert latency.decode_ns > 0
        timing = answer.trailers["server-timing"]
        assert {part.split(";")[0].strip() for part in timing.split(",")} >= {"prefill", "decode", "total", "network"}
        assert latency.executor_id


async def test_seeds_repeat_and_n_samples_differ(line: Line) -> None:
    sampling = common_pb2.SamplingParams(max_tokens=12, temperature=1, seed=5, n=3, ignore_eos=True)
    first, second = await asyncio.gather(*(ask(line, chat("Tell me a story.", sampling=sampling)) for _ in range(2)))
    assert first.texts == second.texts
    assert len(set(first.texts.values())) == 3
    assert first.finished.usage.completion_tokens == 36
    drawn = await ask(line, chat("Hi", sampling=common_pb2.SamplingParams(max_tokens=8, ignore_eos=True)))
    again = await ask(
        line,
        chat("Hi", sampling=common_pb2.SamplingParams(max_tokens=8, ignore_eos=True, seed=drawn.started.seed)),
    )
    assert again.text == drawn.text


async def test_stop_strings_end_the_answer_on_the_executor(line: Line) -> None:
    plain = await ask(line, chat("Count from one to twenty."))
    stop = plain.text[5:9]
    answer = await ask(line, chat("Count from one to twenty.", stop=[stop]))
    assert answer.text == plain.text[: plain.text.index(stop)]
    assert answer.finished.samples[0].stop == stop
    long = common_pb2.SamplingParams(max_tokens=800, temperature=0, ignore_eos=True)
    included = await ask(line, chat("Count from one to twenty.", stop=[stop], include_stop=True, sampling=long))
    assert included.text == answer.text + stop
    # Usage is what came, however far the executor got before it heard of the stop text.
    assert included.finished.usage.completion_tokens == answer.finished.usage.completion_tokens < 20


async def test_deadline_and_cancellation_reach_the_executor(line: Line) -> None:
    long = common_pb2.SamplingParams(max_tokens=900, temperature=0, ignore_eos=True)
    before = await line.executor_info()
    answer = await ask(line, chat("Go on and on.", sampling=long), timeout=1.0)
    assert answer.code is grpc.StatusCode.DEADLINE_EXCEEDED
    task = asyncio.create_task(ask(line, chat("Go on and on.", sampling=long)))
    async with asyncio.timeout(PATIENCE):
        while (await line.executor_info()).load.running == 0:
            await asyncio.sleep(0.02)
        task.cancel()
        while (info := await line.executor_info()).load.running:
            await asyncio.sleep(0.02)
    assert info.load.free_blocks == info.load.total_blocks
    assert info.cancelled > before.cancelled


async def log_probabilities(line: Line) -> tuple[generation_pb2.PromptLogprobs, list[generation_pb2.Delta]]:
    """Return the log-probabilities of a prompt and of the tokens that follow it."""
    async with line.channel() as channel:
        tokenizer = tokenizer_pb2_grpc.TokenizerStub(channel)
        ids = (await tokenizer.Encode(tokenizer_pb2.EncodeRequest(text="The capital of France is"))).token_ids
    request = generation_pb2.GenerateRequest(
        tokens=generation_pb2.TokenIds(ids=ids),
        sampling=common_pb2.SamplingParams(max_tokens=4, temperature=0, logprobs=2, prompt_logprobs=1),
        output=generation_pb2.OUTPUT_TEXT_AND_TOKEN_IDS,
    )
    async with line.channel() as channel:
        deltas, prompt = [], None
        async for response in generation_pb2_grpc.GenerationStub(channel).Generate(request):
            if response.WhichOneof("event") == "prompt_logprobs":
                prompt = response.prompt_logprobs
            elif response.WhichOneof("event") == "delta":
                deltas.append(response.delta)
    assert list(prompt.token_ids) == list(ids)
    return prompt, deltas


async def test_logprobs_reach_the_client(line: Line) -> None:
    prompt, deltas = await log_probabilities(line)
    assert len(prompt.logprobs.logprobs) == len(prompt.token_ids)
    assert prompt.logprobs.logprobs[0] == 0
    assert max(prompt.logprobs.logprobs[1:]) < 0
    for delta in deltas:
        assert len(delta.logprobs.logprobs) == delta.num_tokens
        assert len(delta.logprobs.top_token_ids) == 2 * delta.num_tokens
        for place in range(delta.num_tokens):  # greedy: the token is the most likely one
            assert delta.logprobs.top_token_ids[2 * place] == delta.token_ids[place]


@pytest.mark.slow  # transformers takes eight seconds of CPU time to read the model
async def test_log_probabilities_of_a_prompt_are_those_of_transformers(line: Line, model_dir) -> None:
    prompt, _ = await log_probabilities(line)
    ids = list(prompt.token_ids)
    model = load_gguf_oracle(model_dir("smollm2-135m-instruct"), 49152)
    with torch.inference_mode():
        scores = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0], dim=-1)[:-1]
    of_prompt = scores.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    best = scores.topk(1)
    assert list(prompt.logprobs.logprobs[1:]) == pytest.approx(of_prompt.tolist(), abs=1e-2)
    assert list(prompt.logprobs.top_token_ids) == [0, *best.indices[:, 0].tolist()]
    assert list(prompt.logprobs.top_logprobs) == pytest.approx([0, *best.values[:, 0].tolist()], abs=1e-2)
