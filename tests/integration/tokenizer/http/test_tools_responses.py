"""OpenAI's own client with functions in responses: items, events, what is kept, and streams that are gone on with."""

from __future__ import annotations

import json

import openai
import pytest
import pytest_asyncio

from service_processes import PATIENCE

MODEL = "smollm2-135m-instruct"
TOOL = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather of a town",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'


@pytest_asyncio.fixture(loop_scope="session")
async def ai(service, client):
    options = {"api_key": "none", "timeout": PATIENCE, "_strict_response_validation": True}
    async with openai.AsyncOpenAI(base_url=f"http://{service.http_address}/v1", **options) as made:
        yield made


def asked(**fields):
    return {"model": MODEL, "input": "Weather?", "max_output_tokens": 200, "tools": [TOOL], **fields}


def shown(output) -> list[tuple[str, str]]:
    return [
        (item.type, json.loads(item.arguments) if item.type == "function_call" else item.content[0].text)
        for item in output
    ]


ITEMS = [("message", "I look."), ("function_call", {"city": "Paris"}), ("function_call", {"city": "Paris"})]


@pytest.mark.parametrize("chunk", [1, 5, 1000])
async def test_events_build_the_items_of_the_document(ai, write, chunk):
    write(f"I look.\n{CALL}\n{CALL}", chunk=chunk)
    whole = await ai.responses.create(**asked(parallel_tool_calls=True))
    assert shown(whole.output) == ITEMS
    assert whole.tools[0].name == "get_weather"
    items: dict[int, str] = {}
    numbers = []
    async for event in await ai.responses.create(**asked(stream=True)):
        numbers.append(event.sequence_number)
        match event.type:
            case "response.output_item.added":
                assert event.output_index == len(items)
                items[event.output_index] = ""
            case "response.output_text.delta" | "response.function_call_arguments.delta":
                items[event.output_index] += event.delta
            case "response.function_call_arguments.done":
                assert items[event.output_index] == event.arguments
            case "response.output_item.done":
                assert event.item.status == "completed"
            case "response.completed":
                final = event.response
    assert shown(final.output) == ITEMS
    texts = [json.loads(text) if text.startswith("{") else text for text in items.values()]
    assert texts == [text for _, text in ITEMS]
    assert numbers == sorted(set(numbers))


async def test_a_conversation_goes_on_behind_its_calls(ai, scheduler, write, tokenizer):
    write(CALL)
    first = await ai.responses.create(**asked(tool_choice="required"))
    (call,) = first.output
    write("Grey.")
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "It is grey."}
    kept = await ai.responses.create(**asked(input=[result], previous_response_id=first.id))
    echoed = [{"role": "user", "content": "Weather?"}, call.model_dump(exclude_none=True), result]
    sent = await ai.responses.create(**asked(input=echoed))
    assert kept.output_text == sent.output_text == "Grey."
    prompts = [tokenizer.decode(submit.token_ids, skip_special_tokens=False) for submit in scheduler.submits[1:]]
    assert prompts[0] == prompts[1]
    assert f"{CALL}<|im_end|>" in prompts[0]
    assert "<tool_response>\nIt is grey.\n</tool_response>" in prompts[0]
    items = [item async for item in ai.responses.input_items.list(kept.id, order="asc")]
    assert [item.type for item in items] == ["message", "function_call", "function_call_output"]
    assert items[1].call_id == items[2].call_id == call.call_id


@pytest.mark.parametrize("chunk", [1, 5, 1000])
async def test_a_stream_of_calls_is_gone_on_with(ai, write, chunk):
    """Between any two events, however many tokens came at once at first and come at once now."""
    write(f"I look.\n{CALL}", chunk=chunk)
    stream = await ai.responses.create(**asked(stream=True, background=True))
    events = [event async for event in stream]
    response_id = events[0].response.id
    for last in events[::3]:
        rest = await ai.responses.retrieve(response_id, stream=True, starting_after=last.sequence_number)
        seen = [event for event in events if event.sequence_number <= last.sequence_number]
        again = [*seen, *[event async for event in rest]]
        assert text_of(again) == text_of(events)
        assert again[-1].type == "response.completed"
        assert shown(again[-1].response.output) == ITEMS[:2]


def text_of(events) -> list[tuple[int, str]]:
    """All text and all arguments of the events, by item."""
    told: dict[int, str] = {}
    for event in events:
        if event.type.endswith(".delta"):
            told[event.output_index] = told.get(event.output_index, "") + event.delta
    return sorted(told.items())


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{**TOOL, "parameters": {"not": {}}}]}, "tools[0].parameters"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id"),
        ({"input": [{"type": "computer_call"}]}, "input[0].type"),
        (
            {"input": [{"role": "user", "content": "a"}, {"type": "function_call", "call_id": "1", "name": ""}]},
            "input[1].tool_calls[0].name",
        ),
    ],
)
async def test_refusals_name_the_field(http, fields, param):
    reply = await http.post("/v1/responses", asked(**fields))
    assert (reply.status, reply.error["param"]) == (400, param)
