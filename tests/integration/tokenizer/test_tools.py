"""Functions that a model calls: told apart from text, kept in sessions, and the same for who goes on with a stream."""

from __future__ import annotations

import json

import grpc
import pytest

from scalellm.v1 import common_pb2, generation_pb2, sessions_pb2
from scripted_scheduler import Script

CITY = '{"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}'
ANSWER = (
    'I look it up.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich 😀"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
)
REQUIRED = generation_pb2.ToolChoice(mode=generation_pb2.TOOL_CHOICE_MODE_REQUIRED)


@pytest.fixture
def write(scheduler, tokenizer):
    """Let the model write a text, and end."""

    def write(text: str, n: int = 1) -> None:
        tokens = [*tokenizer.encode(text).ids, tokenizer.token_to_id("<|im_end|>")]
        stop = common_pb2.FINISH_REASON_STOP
        scheduler.play = lambda submit: Script(samples=[tokens] * n, reason=stop, stop_token=True, delay=0.001)

    return write


def request(*messages: generation_pb2.ChatMessage, **fields) -> generation_pb2.GenerateRequest:
    chat = generation_pb2.Chat(messages=messages or [generation_pb2.ChatMessage(role="user", content="How is it?")])
    chat.tools.add(name="get_weather", description="The weather of a town", parameters=CITY)
    chat.tools.add(name="now")
    return generation_pb2.GenerateRequest(chat=chat, sampling=common_pb2.SamplingParams(max_tokens=500), **fields)


def parts_of(deltas, index: int = 0) -> tuple[str, list[tuple[str, str, str]]]:
    """The text of a sample, and its calls: id, name, arguments."""
    text, calls = "", []
    for delta in deltas:
        if delta.index != index:
            continue
        texts = "".join(part.text for part in delta.parts)
        assert texts == delta.text
        text += texts
        for part in delta.parts:
            if part.HasField("tool_call"):
                call = part.tool_call
                if call.id:
                    assert call.index == len(calls)
                    calls.append((call.id, call.name, ""))
                calls[call.index] = (*calls[call.index][:2], calls[call.index][2] + call.arguments)
    return text, calls


async def test_calls_are_told_apart(client, scheduler, write):
    write(ANSWER, n=2)
    message = request()
    message.sampling.n = 2
    answer = await client.generate(message)
    for index in (0, 1):
        text, calls = parts_of(answer.deltas, index)
        assert text == "I look it up."
        assert [(name, json.loads(arguments)) for _, name, arguments in calls] == [
            ("get_weather", {"city": "Zürich 😀"}),
            ("now", {}),
        ]
    assert [sample.num_tool_calls for sample in answer.finished.samples] == [2, 2]
    ids = [call[0] for index in (0, 1) for call in parts_of(answer.deltas, index)[1]]
    assert len(set(ids)) == 4
    assert sum(delta.num_tokens for delta in answer.deltas) == answer.finished.usage.completion_tokens
    grammar = scheduler.submits[0].grammar
    assert "get_weather" in grammar
    assert "<tool_call>" in grammar


async def test_without_tools_all_is_text(client, scheduler, write):
    write(ANSWER)
    for mode in (None, generation_pb2.TOOL_CHOICE_MODE_NONE):
        message = request()
        if mode is None:
            del message.chat.tools[:]
        else:
            message.chat.tool_choice.mode = mode
        answer = await client.generate(message)
        assert answer.text() == ANSWER
        assert not any(delta.parts for delta in answer.deltas)
        assert scheduler.submits[-1].grammar == ""
    prompts = [bytes(str(submit.token_ids), "ascii") for submit in scheduler.submits]
    assert prompts[0] == prompts[1], "a model that is to call nothing is told of nothing"


async def test_who_goes_on_sees_the_same_parts(client, write):
    write(ANSWER)
    reference = request(request_id="tools-1", on_disconnect=generation_pb2.ON_DISCONNECT_KEEP)
    whole = await client.generate(reference)
    assert whole.started.resumable
    num_tokens = sum(delta.num_tokens for delta in whole.deltas)
    for offset in range(0, num_tokens + 1, 7):
        resume = generation_pb2.ResumeRequest(request_id="tools-1", offsets=[offset])
        events = [event async for event in client.generation.Resume(resume)]
        seen = [delta for delta in whole.deltas if delta.offset + delta.num_tokens <= offset]
        rest = [event.delta for event in events if event.HasField("delta")]
        if sum(delta.num_tokens for delta in seen) == offset:
            assert parts_of([*seen, *rest]) == parts_of(whole.deltas)
        assert events[-1].finished.samples == whole.finished.samples


async def test_a_session_keeps_calls_and_results(client, scheduler, write, tokenizer):
    write(ANSWER)
    first = await client.generate(request(session_id="tools"))
    _, calls = parts_of(first.deltas)
    got = await client.sessions.Get(sessions_pb2.GetSessionRequest(session_id="tools"))
    stored = got.session.messages[-1]
    assert stored.content == "I look it up."
    assert [(call.id, call.name, call.arguments) for call in stored.tool_calls] == calls
    write("Grey.")
    results = [
        generation_pb2.ChatMessage(role="tool", content=f"result {number}", tool_call_id=call_id)
        for number, (call_id, _, _) in enumerate(calls)
    ]
    second = await client.generate(request(*results, session_id="tools"))
    assert second.text() == "Grey."
    before, after = (list(submit.token_ids) for submit in scheduler.submits)
    written = tokenizer.encode(ANSWER).ids
    assert after[: len(before) + len(written)] == before + written, "what was read and written stays as it was"
    assert "result 0\n</tool_response>\n<tool_response>\nresult 1" in tokenizer.decode(after)


@pytest.mark.parametrize(
    ("change", "field", "says"),
    [
        (lambda chat: chat.tools.add(name="now"), "chat.tools[2].name", "'now' again"),
        (lambda chat: chat.tools.add(name="a b"), "chat.tools[2].name", "1 to 64 characters"),
        (lambda chat: chat.tools.add(name="a", parameters="["), "chat.tools[2].parameters", "is not JSON"),
        (lambda chat: chat.tools.add(name="a", parameters='{"type": "string"}'), "chat.tools[2].parameters", "object"),
        (lambda chat: chat.tools.add(name="a", parameters='{"not": {}}'), "chat.tools[2].parameters", "'not'"),
        (lambda chat: [chat.tools.add(name=f"t{n}") for n in range(127)], "chat.tools", "at most 128"),
        (lambda chat: chat.tools.add(name="a", parameters=json.dumps({"title": "x" * 2**16})), "chat.tools", "65536"),
        (lambda chat: chat.tool_choice.names.append("other"), "chat.tool_choice.names[0]", "'other'"),
        (lambda chat: chat.MergeFrom(generation_pb2.Chat(documents="{}")), "chat.documents", "a JSON list"),
        (
            lambda chat: chat.messages[0].tool_calls.add(id="1", name="now"),
            "chat.messages[0].tool_calls",
            "role assistant",
        ),
        (
            lambda chat: chat.messages.add(role="assistant").tool_calls.add(id="1", name="now", arguments="[]"),
            "chat.messages[1].tool_calls[0].arguments",
            "JSON object",
        ),
    ],
)
async def test_refusals_name_the_field_and_the_limit(client, scheduler, error_details, change, field, says):
    message = request()
    change(message.chat)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.generate(message)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    violations, _ = error_details(caught.value)
    assert says in violations[field]
    assert scheduler.submits == []


async def test_what_excludes_each_other(client, error_details):
    both = request()
    both.chat.tool_choice.CopyFrom(REQUIRED)
    both.structured_output.json_object.SetInParent()
    own = request()
    own.structured_output.lark = 'start: "x"'
    none = request()
    del none.chat.tools[:]
    none.chat.tool_choice.CopyFrom(REQUIRED)
    budget = request()
    budget.reasoning.budget_tokens = 5
    for message, field in (
        (both, "structured_output"),
        (own, "structured_output.lark"),
        (none, "chat.tool_choice"),
        (budget, "reasoning.budget_tokens"),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.generate(message)
        assert list(error_details(caught.value)[0]) == [field]
