"""Anthropic's own client, with every answer checked against its own types."""

from __future__ import annotations

import pytest
import pytest_asyncio

from scalellm.v1 import common_pb2, link_pb2
from scripted_scheduler import Script
from service_processes import PATIENCE, eventually

MODEL = "smollm2-135m-instruct"
HELLO = [{"role": "user", "content": "Hello"}]


@pytest_asyncio.fixture(loop_scope="session")
async def ai(service, client, anthropic):
    async with anthropic.AsyncAnthropic(
        base_url=f"http://{service.http_address}", api_key="none", timeout=PATIENCE, _strict_response_validation=True
    ) as made:
        yield made


def message(**fields):
    return {"model": MODEL, "messages": HELLO, "max_tokens": 5, **fields}


async def test_a_message_and_the_same_as_a_stream(ai, scheduler, tokenizer):
    scheduler.play = lambda submit: Script(samples=[list(range(1000, 1005))], cached_tokens=3)
    text = tokenizer.decode(list(range(1000, 1005)))
    made = await ai.messages.create(**message(system=[{"type": "text", "text": "Be brief."}]))
    assert [block.text for block in made.content] == [text]
    assert (made.type, made.role, made.stop_reason, made.stop_sequence) == ("message", "assistant", "max_tokens", None)
    usage = made.usage
    assert (usage.output_tokens, usage.cache_read_input_tokens) == (5, 3)
    assert usage.input_tokens == len(scheduler.submits[0].token_ids) - 3
    counted = await ai.messages.count_tokens(model=MODEL, messages=HELLO, system="Be brief.")
    assert counted.input_tokens == len(scheduler.submits[0].token_ids)
    async with ai.messages.stream(**message(system="Be brief.")) as stream:
        assert "".join([part async for part in stream.text_stream]) == text
        final = await stream.get_final_message()
    assert final.usage.output_tokens == 5
    assert final.stop_reason == "max_tokens"
    assert list(scheduler.submits[0].token_ids) == list(scheduler.submits[1].token_ids)


async def test_an_answer_goes_on_with_its_beginning(ai, scheduler, tokenizer):
    scheduler.play = lambda submit: Script(samples=[tokenizer.encode(" two.").ids])
    begun = [*HELLO, {"role": "assistant", "content": "It is"}]
    made = await ai.messages.create(**message(messages=begun))
    assert [block.text for block in made.content] == [" two."]
    read = tokenizer.decode(list(scheduler.submits[0].token_ids), skip_special_tokens=False)
    assert read.endswith("<|im_start|>assistant\nIt is")


@pytest.mark.parametrize("stream", [False, True])
async def test_how_it_ended(ai, scheduler, tokenizer, stream):
    async def ask(**fields):
        if not stream:
            return await ai.messages.create(**message(**fields))
        async with ai.messages.stream(**message(**fields)) as events:
            return await events.get_final_message()

    scheduler.play = lambda submit: Script(reason=common_pb2.FINISH_REASON_STOP)
    assert (await ask()).stop_reason == "end_turn"
    tokens = list(range(1000, 1005))
    scheduler.play = lambda submit: Script(samples=[tokens])
    stop = tokenizer.decode(tokens[2:3])
    ended = await ask(stop_sequences=["never", stop])
    assert (ended.stop_reason, ended.stop_sequence) == ("stop_sequence", stop)


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"extra_body": {"temperature": 101}}, "BadRequestError", "temperature: must be in"),
        ({"model": "claude"}, "NotFoundError", "model: 'claude' is not served"),
        ({"messages": [{"role": "system", "content": "a"}]}, "BadRequestError", "messages[0].role: must be"),
        ({"stop_sequences": [""]}, "BadRequestError", "stop_sequences[0]: must have 1 to"),
        ({"tools": [{"name": "a b", "input_schema": {}}]}, "BadRequestError", "tools[0].name: must be 1 to 64"),
        (
            {"tools": [{"name": "f", "input_schema": {"not": {}}}]},
            "BadRequestError",
            "tools[0].input_schema: has the keyword 'not'",
        ),
        ({"thinking": {"type": "enabled", "budget_tokens": 2000}}, "BadRequestError", "thinking.budget_tokens"),
    ],
)
async def test_refusals_are_its_errors(ai, anthropic, scheduler, fields, error, words):
    with pytest.raises(getattr(anthropic, error)) as caught:
        await ai.messages.create(**message(**fields))
    assert words in caught.value.body["error"]["message"]
    assert scheduler.submits == []


async def test_an_error_in_a_stream_is_raised(ai, anthropic, scheduler):
    status = link_pb2.LinkStatus(code=14, message="the executor is gone")
    scheduler.play = lambda submit: Script(fail_after=2, delay=0.1, status=status)
    with pytest.raises(anthropic.APIStatusError, match="the executor is gone"):
        async with ai.messages.stream(**message()) as stream:
            await stream.get_final_message()


async def test_closing_a_stream_cancels(ai, scheduler):
    scheduler.play = lambda submit: Script(hold_after=2)
    stream = await ai.messages.create(**message(stream=True))
    await anext(aiter(stream))
    await stream.close()
    await eventually(lambda: len(scheduler.aborts) == 1 and scheduler.num_running == 0)


WEATHER = {
    "name": "get_weather",
    "description": "The weather of a town",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'


@pytest.mark.parametrize("chunk", [1, 1000])
async def test_tools_are_used_and_their_results_read(ai, scheduler, tokenizer, write, chunk):
    write(f"I look.\n{CALL}\n{CALL}", chunk=chunk)
    asked = message(max_tokens=200, tools=[WEATHER], tool_choice={"type": "auto"})
    made = await ai.messages.create(**asked)
    assert [block.type for block in made.content] == ["text", "tool_use", "tool_use"]
    assert made.content[0].text == "I look."
    assert [block.input for block in made.content[1:]] == [{"city": "Paris"}] * 2
    assert made.stop_reason == "tool_use"
    async with ai.messages.stream(**asked) as stream:
        kinds = [event.type async for event in stream]
        final = await stream.get_final_message()
    assert "input_json" in kinds
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 3
    assert [(block.type, getattr(block, "input", None)) for block in final.content] == [
        (block.type, getattr(block, "input", None)) for block in made.content
    ]
    write("Grey.")
    results = [
        {"type": "tool_result", "tool_use_id": block.id, "content": [{"type": "text", "text": f"grey {number}"}]}
        for number, block in enumerate(made.content[1:])
    ]
    said = [
        *HELLO,
        {"role": "assistant", "content": [block.model_dump() for block in made.content]},
        {"role": "user", "content": [*results, {"type": "text", "text": "So?"}]},
    ]
    answer = await ai.messages.create(**{**asked, "messages": said})
    assert [block.text for block in answer.content] == ["Grey."]
    assert answer.stop_reason == "end_turn"
    prompt = tokenizer.decode(scheduler.submits[-1].token_ids, skip_special_tokens=False)
    assert f"I look.\n{CALL}\n{CALL}<|im_end|>" in prompt
    assert "grey 0\n</tool_response>\n<tool_response>\ngrey 1\n</tool_response><|im_end|>" in prompt
    assert prompt.endswith("So?<|im_end|>\n<|im_start|>assistant\n")
    counted = await ai.messages.count_tokens(model=MODEL, messages=said, tools=[WEATHER])
    assert counted.input_tokens == len(scheduler.submits[-1].token_ids)


@pytest.mark.parametrize(
    ("choice", "has", "has_not"),
    [
        ({"type": "any"}, ("get_weather", "{0,127}"), ("trigger",)),
        ({"type": "any", "disable_parallel_tool_use": True}, ("get_weather",), ("trigger", "{0,127}")),
        ({"type": "tool", "name": "get_weather"}, ("get_weather",), ("trigger", "{0,127}")),
        ({"type": "none"}, (), ("start",)),
    ],
)
async def test_the_choice_of_tools(ai, scheduler, choice, has, has_not):
    await ai.messages.create(**message(tools=[WEATHER], tool_choice=choice))
    grammar = scheduler.submits[0].grammar
    assert all(part in grammar for part in has)
    assert not any(part in grammar for part in has_not)
