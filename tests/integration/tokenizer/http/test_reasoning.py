"""A model that reasons, by all APIs: its reasoning is told apart from its text, bounded, and no part of a shape."""

from __future__ import annotations

import json

import openai
import pytest
import pytest_asyncio
from tokenizers import AddedToken

from scalellm.services.tokenizer.text.loading import load_model_tokenizer
from scripted_scheduler import ScriptedScheduler
from service_processes import PATIENCE
from tool_templates import HERMES

MODEL = "thinker"
HELLO = [{"role": "user", "content": "Is 7 prime?"}]
ANSWER = "<think>\nOnly 1 and 7\ndivide it.\n</think>\n\nYes, it is."


@pytest.fixture(scope="module")
def tokenizer(model_dir):
    """SmolLM2's, with marks of reasoning."""
    made = load_model_tokenizer(model_dir("smollm2-135m-instruct")).tokenizer
    made.add_tokens([AddedToken(text, special=False, normalized=False) for text in ("<think>", "</think>")])
    return made


@pytest.fixture(scope="module")
def thinker(tmp_path_factory, tokenizer):
    """A model with that tokenizer, and a template that has the marks."""
    folder = tmp_path_factory.mktemp("models") / MODEL
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": tokenizer.token_to_id("<|im_end|>")}))
    config = {"chat_template": HERMES, "eos_token": "<|im_end|>", "bos_token": "<|im_start|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def shared_scheduler():
    """A scheduler of this module alone: its model has two tokens more."""
    scheduler = ScriptedScheduler()
    scheduler.vocab_size += 2
    await scheduler.start()
    yield scheduler
    await scheduler.stop()


@pytest.fixture(scope="module")
def service(shared_scheduler, module_spawn, module_redis, thinker):
    return module_spawn(
        "tokenizer", "--scheduler", shared_scheduler.address, "--model", str(thinker), "--workers", "1",
        "--redis-url", module_redis.url, "--metrics-port", "0",
    )  # fmt: skip


@pytest_asyncio.fixture(loop_scope="session")
async def ai(service, client):
    async with openai.AsyncOpenAI(
        base_url=f"http://{service.http_address}/v1", api_key="none", timeout=PATIENCE
    ) as made:
        yield made


def num_reasoned(tokenizer):
    """Tokens between the marks."""
    token_ids = tokenizer.encode(ANSWER, add_special_tokens=False).ids
    begin, end = (token_ids.index(tokenizer.token_to_id(mark)) for mark in ("<think>", "</think>"))
    return end - begin - 1


def asked(**fields):
    return {"model": MODEL, "messages": HELLO, "max_tokens": 100, **fields}


async def test_chats_have_it_beside_their_content(ai, write, tokenizer):
    write(ANSWER, chunk=2)
    whole = await ai.chat.completions.create(**asked())
    assert whole.usage.completion_tokens_details.reasoning_tokens == num_reasoned(tokenizer)
    message = whole.choices[0].message
    assert message.content == "Yes, it is."
    assert message.reasoning_content == "Only 1 and 7\ndivide it."
    told = {"content": "", "reasoning_content": ""}
    async for chunk in await ai.chat.completions.create(**asked(stream=True)):
        for name in told:
            told[name] += getattr(chunk.choices[0].delta, name, None) or ""
    assert told == {"content": "Yes, it is.", "reasoning_content": "Only 1 and 7\ndivide it."}
    without = await ai.chat.completions.create(**asked(extra_body={"include_reasoning": False}))
    assert without.choices[0].message.content == "Yes, it is."
    assert not hasattr(without.choices[0].message, "reasoning_content")
    assert without.usage.completion_tokens_details.reasoning_tokens == num_reasoned(tokenizer)


async def test_messages_and_responses_have_it_as_a_part(ai, anthropic, service, write, tokenizer):
    write(ANSWER, chunk=2)
    made = await ai.responses.create(model=MODEL, input="Is 7 prime?")
    assert [item.type for item in made.output] == ["reasoning", "message"]
    assert made.output[0].content[0].text == "Only 1 and 7\ndivide it."
    assert made.output_text == "Yes, it is."
    assert made.usage.output_tokens_details.reasoning_tokens == num_reasoned(tokenizer)
    events = [event async for event in await ai.responses.create(model=MODEL, input="Is 7 prime?", stream=True)]
    thought = "".join(event.delta for event in events if event.type == "response.reasoning_text.delta")
    assert thought == "Only 1 and 7\ndivide it."
    async with anthropic.AsyncAnthropic(
        base_url=f"http://{service.http_address}", api_key="none", timeout=PATIENCE
    ) as other:
        quiet = await other.messages.create(**asked())
        assert [block.type for block in quiet.content] == ["text"]
        thinking = {"type": "enabled", "budget_tokens": 5}
        loud = await other.messages.create(**asked(thinking=thinking))
        assert [block.type for block in loud.content] == ["thinking", "text"]
        async with other.messages.stream(**asked(thinking=thinking)) as stream:
            final = await stream.get_final_message()
    assert final.content[0].thinking == loud.content[0].thinking == "Only 1 and 7\ndivide it."


async def test_a_budget_is_a_part_of_the_grammar(ai, scheduler, write, tokenizer):
    write(ANSWER, chunk=2)
    end = tokenizer.token_to_id("</think>")
    await ai.chat.completions.create(**asked(extra_body={"thinking_token_budget": 5}))
    await ai.chat.completions.create(**asked())
    bounded, free = (submit.grammar for submit in scheduler.submits)
    assert f"{{0,5}} <[{end}]>" in bounded
    assert free == ""


async def test_a_shape_is_that_of_the_text(ai, scheduler, write):
    write('<think>Hm.</think>\n\n{"prime": true}')
    made = await ai.chat.completions.create(**asked(response_format={"type": "json_object"}))
    assert json.loads(made.choices[0].message.content) == {"prime": True}
    assert scheduler.submits[0].grammar.startswith('start: ("<think>" reasoning)? answer\n')


async def test_a_session_gives_it_back_to_the_template(ai, scheduler, write, tokenizer):
    write(ANSWER, chunk=2)
    await ai.chat.completions.create(**asked(extra_body={"session_id": "thought"}))
    write("No.")
    await ai.chat.completions.create(**asked(extra_body={"session_id": "thought"}))
    prompt = tokenizer.decode(scheduler.submits[1].token_ids, skip_special_tokens=False)
    assert "Yes, it is.<|im_end|>" in prompt
    assert "divide it" not in prompt, "this template leaves out what was thought in earlier turns"
