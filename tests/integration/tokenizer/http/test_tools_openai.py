"""OpenAI's own client with functions to call: its types, its helpers, and what goes to the model."""

from __future__ import annotations

import json

import openai
import pytest
import pytest_asyncio
from openai import pydantic_function_tool
from pydantic import BaseModel

from service_processes import PATIENCE

MODEL = "smollm2-135m-instruct"
HELLO = [{"role": "user", "content": "How is the weather in Paris?"}]
BAD_CALL = {"name": "a", "arguments": "["}
CALL = '<tool_call>\n{"name": "GetWeather", "arguments": {"city": "Paris", "days": 2}}\n</tool_call>'


class GetWeather(BaseModel):
    """The weather of a town."""

    city: str
    days: int


class Now(BaseModel):
    """The time."""


TOOLS = [pydantic_function_tool(GetWeather), pydantic_function_tool(Now)]


@pytest_asyncio.fixture(loop_scope="session")
async def ai(service, client):
    options = {"api_key": "none", "timeout": PATIENCE, "_strict_response_validation": True}
    async with openai.AsyncOpenAI(base_url=f"http://{service.http_address}/v1", **options) as made:
        yield made


def asked(**fields):
    return {"model": MODEL, "messages": HELLO, "max_tokens": 200, "tools": TOOLS, **fields}


@pytest.mark.parametrize("chunk", [1, 4, 1000])
async def test_a_streamed_call_is_the_whole_one(ai, scheduler, write, chunk):
    write(f"Let me see.\n{CALL}\n{CALL}", chunk=chunk)
    whole = (await ai.chat.completions.create(**asked())).choices[0]
    assert whole.finish_reason == "tool_calls"
    assert whole.message.content == "Let me see."
    arguments = [json.loads(call.function.arguments) for call in whole.message.tool_calls]
    assert arguments == [{"city": "Paris", "days": 2}] * 2
    assert [call.function.name for call in whole.message.tool_calls] == ["GetWeather"] * 2
    assert len({call.id for call in whole.message.tool_calls}) == 2
    text, calls = "", {}
    async for part in await ai.chat.completions.create(**asked(stream=True)):
        delta = part.choices[0].delta
        text += delta.content or ""
        for call in delta.tool_calls or ():
            if call.id:
                assert call.type == "function"
                calls[call.index] = [call.function.name, ""]
            calls[call.index][1] += call.function.arguments
        reason = part.choices[0].finish_reason
    assert (text, reason) == ("Let me see.", "tool_calls")
    assert [(name, json.loads(arguments)) for name, arguments in calls.values()] == [
        ("GetWeather", {"city": "Paris", "days": 2})
    ] * 2


async def test_the_helpers_parse_calls(ai, write):
    write(CALL)
    parsed = (await ai.chat.completions.parse(**asked(tool_choice="required"))).choices[0].message
    assert parsed.content is None
    assert parsed.tool_calls[0].function.parsed_arguments == GetWeather(city="Paris", days=2)
    async with ai.chat.completions.stream(**asked()) as stream:
        kinds = [event.type async for event in stream]
        final = await stream.get_final_completion()
    assert "tool_calls.function.arguments.delta" in kinds
    assert "tool_calls.function.arguments.done" in kinds
    assert final.choices[0].message.tool_calls[0].function.parsed_arguments == GetWeather(city="Paris", days=2)


@pytest.mark.parametrize(
    ("choice", "has", "has_not"),
    [
        ("auto", ("TEXT", "GetWeather", "Now", "{0,127}"), ()),
        ("required", ("GetWeather", "Now"), ("trigger",)),
        ({"type": "function", "function": {"name": "Now"}}, ("Now",), ("GetWeather", "trigger", "{0,127}")),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "function": {"name": "Now"}}]},
            },
            ("Now", "trigger"),
            ("GetWeather",),
        ),
        ("none", (), ("start",)),
    ],
)
async def test_the_choice_is_a_grammar(ai, scheduler, write, choice, has, has_not):
    write("Hi", is_cut=True)
    await ai.chat.completions.create(**asked(tool_choice=choice))
    grammar = scheduler.submits[0].grammar
    assert all(part in grammar for part in has)
    assert not any(part in grammar for part in has_not)
    await ai.chat.completions.create(**asked(tool_choice=choice, parallel_tool_calls=False))
    assert "{0,127}" not in scheduler.submits[1].grammar


async def test_a_call_that_was_cut_off(ai, write):
    write(CALL[:-30], is_cut=True)
    choice = (await ai.chat.completions.create(**asked())).choices[0]
    assert choice.finish_reason == "length"
    assert choice.message.tool_calls is None, "what is no JSON object is no call"
    assert choice.message.content == ""


async def test_results_go_back_to_the_model(ai, scheduler, write, tokenizer):
    write(CALL)
    message = (await ai.chat.completions.create(**asked())).choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "Grey."}
    write("It is grey.")
    said = [*HELLO, message.model_dump(exclude_none=True), result]
    answer = await ai.chat.completions.create(**asked(messages=said))
    assert answer.choices[0].message.content == "It is grey."
    assert answer.choices[0].finish_reason == "stop"
    prompt = tokenizer.decode(scheduler.submits[1].token_ids, skip_special_tokens=False)
    assert CALL in prompt
    assert "<tool_response>\nGrey.\n</tool_response>" in prompt


async def test_strict_is_never_ignored(ai, scheduler, write):
    write("Hi", is_cut=True)
    schema = {"type": "object", "properties": {"tags": {"type": "array", "uniqueItems": True}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    for strict in (None, True):
        if strict is not None:
            tool["function"]["strict"] = strict
        with pytest.raises(openai.BadRequestError, match="'uniqueItems'") as caught:
            await ai.chat.completions.create(**asked(tools=[tool]))
        assert caught.value.param == "tools[0].function.parameters"
    tool["function"]["strict"] = False
    await ai.chat.completions.create(**asked(tools=[tool]))
    assert "uniqueItems" not in scheduler.submits[0].grammar


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": {}}, "tools"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": 5}}]}, "tools[0].function.parameters"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice.names[0]"),
        ({"tool_choice": {"type": "custom"}}, "tool_choice.type"),
        ({"thinking_token_budget": 5}, "thinking_token_budget"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "messages[0].tool_calls[0].function"),
        (
            {
                "messages": [
                    {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "a", "arguments": "["}}]}
                ]
            },
            "messages[0].tool_calls[0].function.arguments",
        ),
    ],
)
async def test_refusals_name_the_clients_field(http, scheduler, fields, param):
    reply = await http.post("/v1/chat/completions", asked(**fields))
    assert (reply.status, reply.error["param"]) == (400, param)
    assert scheduler.submits == []


async def test_the_prompt_of_tools_can_be_counted(http, scheduler, write):
    write("Hi", is_cut=True)
    await http.post("/v1/chat/completions", asked())
    counted = (await http.post("/tokenize", {"messages": HELLO, "tools": TOOLS})).json
    assert counted["tokens"] == list(scheduler.submits[0].token_ids)
