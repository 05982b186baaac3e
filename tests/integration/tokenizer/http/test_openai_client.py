"""OpenAI's own client, with every answer checked against its own types."""

from __future__ import annotations

import asyncio

import openai
import pytest
import pytest_asyncio

from scalellm.v1 import common_pb2, link_pb2
from scripted_scheduler import Script, default_tokens
from service_processes import PATIENCE, eventually

MODEL = "smollm2-135m-instruct"
HELLO = [{"role": "user", "content": "Hello"}]


def options(service, *, is_strict: bool = True) -> dict:
    return {
        "base_url": f"http://{service.http_address}/v1",
        "api_key": "none",
        "timeout": PATIENCE,
        "_strict_response_validation": is_strict,
    }


@pytest_asyncio.fixture(loop_scope="session")
async def ai(service, client):
    async with openai.AsyncOpenAI(**options(service)) as made:
        yield made


def chat(**fields):
    return {"model": MODEL, "messages": HELLO, "max_tokens": 5, "seed": 1, **fields}


async def test_the_sync_client(service, client, scheduler, tokenizer):
    # Its helper takes an answer that was cut for an error.
    scheduler.play = lambda submit: Script(reason=common_pb2.FINISH_REASON_STOP)

    def talk() -> tuple[str, str, str]:
        with openai.OpenAI(**options(service)) as ai:
            assert [model.id for model in ai.models.list()] == [MODEL]
            assert ai.models.retrieve(MODEL).id == MODEL
            whole = ai.chat.completions.create(**chat()).choices[0].message.content
            chunks = list(ai.chat.completions.create(**chat(stream=True, stream_options={"include_usage": True})))
            assert chunks[-1].usage.completion_tokens == 5
            parts = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
            with ai.chat.completions.stream(**chat()) as stream:
                helped = stream.get_final_completion().choices[0].message.content
            return whole, parts, helped

    texts = await asyncio.to_thread(talk)
    assert set(texts) == {tokenizer.decode(default_tokens(scheduler.submits[0], 0))}


async def test_completions(service, ai, scheduler, tokenizer):
    made = await ai.completions.create(model=MODEL, prompt=["Hello", "Bye"], max_tokens=5, n=2, seed=1, logprobs=2)
    assert [choice.index for choice in made.choices] == [0, 1, 2, 3]
    assert len(made.choices[0].logprobs.token_logprobs) == len(made.choices[0].logprobs.text_offset) == 5
    # Its types know no null where OpenAI's server sends one: before a stream's end, and for a prompt's first token.
    async with openai.AsyncOpenAI(**options(service, is_strict=False)) as lenient:
        stream = await lenient.completions.create(model=MODEL, prompt="Hello", max_tokens=5, seed=1, stream=True)
        assert "".join([chunk.choices[0].text async for chunk in stream]) == made.choices[0].text
        echo = await lenient.completions.create(
            model=MODEL, prompt="Hello", max_tokens=5, seed=1, echo=True, logprobs=2
        )
    assert echo.choices[0].text == f"Hello{made.choices[0].text}"
    assert echo.choices[0].logprobs.token_logprobs[0] is None


async def test_log_probabilities(ai, scheduler):
    made = await ai.chat.completions.create(**chat(logprobs=True, top_logprobs=3))
    content = made.choices[0].logprobs.content
    assert [entry.logprob for entry in content] == [0, -0.25, -0.5, -0.75, -1]
    assert [len(entry.top_logprobs) for entry in content] == [3] * 5


@pytest.mark.parametrize(
    ("fields", "error", "param"),
    [
        ({"temperature": 101}, openai.BadRequestError, "temperature"),
        ({"model": "gpt-5"}, openai.NotFoundError, "model"),
        (
            {"tools": [{"type": "function", "function": {"name": "a b"}}]},
            openai.BadRequestError,
            "tools[0].function.name",
        ),
    ],
)
async def test_refusals_are_its_errors(ai, scheduler, fields, error, param):
    with pytest.raises(error) as caught:
        await ai.chat.completions.create(**chat(**fields))
    assert caught.value.param == param
    assert param in caught.value.body["message"]
    assert scheduler.submits == []


async def test_it_comes_again_when_it_is_told_to(ai, scheduler):
    busy = link_pb2.LinkStatus(code=8, message="the queue is full", retry_after_ns=10_000_000)
    scripts = [
        Script(refuse=busy),
        Script(refuse=link_pb2.LinkStatus(code=14, message="gone", retry_after_ns=1)),
        Script(),
    ]
    scheduler.play = lambda submit: scripts.pop(0)
    made = await ai.chat.completions.create(**chat())
    assert made.usage.completion_tokens == 5
    assert len(scheduler.submits) == 3


async def test_it_does_not_come_again_for_a_deadline(ai, scheduler):
    scheduler.play = lambda submit: Script(refuse=link_pb2.LinkStatus(code=4, message="the deadline passed"))
    with pytest.raises(openai.InternalServerError) as caught:
        await ai.chat.completions.create(**chat())
    assert caught.value.status_code == 504
    assert len(scheduler.submits) == 1


async def test_its_timeout_is_the_requests_deadline(ai, scheduler):
    scheduler.play = lambda submit: Script(hold_after=1)
    patient = ai.with_options(timeout=3.0, max_retries=0)
    with pytest.raises((openai.APITimeoutError, openai.InternalServerError)):
        await patient.chat.completions.create(**chat())
    await eventually(lambda: scheduler.num_running == 0)
    assert 0 < scheduler.submits[0].time_remaining_ns <= 3e9


async def test_closing_a_stream_cancels(ai, scheduler):
    scheduler.play = lambda submit: Script(hold_after=2)
    stream = await ai.chat.completions.create(**chat(stream=True))
    await anext(aiter(stream))
    assert scheduler.num_running == 1
    await stream.close()
    await eventually(lambda: scheduler.num_running == 0)
    assert scheduler.aborts[0].reason == link_pb2.ABORT_REASON_CANCELLED


async def test_an_error_in_a_stream_is_raised(ai, scheduler):
    scheduler.play = lambda submit: Script(
        fail_after=2, delay=0.1, status=link_pb2.LinkStatus(code=13, message="a kernel failed")
    )
    stream = await ai.chat.completions.create(**chat(stream=True))
    with pytest.raises(openai.APIError, match="a kernel failed"):
        async for _ in stream:
            pass


async def test_many_at_once(ai, scheduler, tokenizer):
    made = await asyncio.gather(*(ai.chat.completions.create(**chat(seed=seed)) for seed in range(64)))
    wanted = {submit.sampling.seed: tokenizer.decode(default_tokens(submit, 0)) for submit in scheduler.submits}
    assert [answer.choices[0].message.content for answer in made] == [wanted[seed] for seed in range(64)]
