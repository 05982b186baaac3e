"""/v1/responses with OpenAI's own client, every answer checked against its own types."""

from __future__ import annotations

import openai
import pytest
import pytest_asyncio

from scalellm.v1 import common_pb2, link_pb2
from scripted_scheduler import Script
from service_processes import PATIENCE, eventually

MODEL = "smollm2-135m-instruct"
STOP = common_pb2.FINISH_REASON_STOP


@pytest_asyncio.fixture(loop_scope="session")
async def ai(service, client, scheduler):
    scheduler.play = lambda submit: Script(samples=[list(range(1000, 1005))], reason=STOP, cached_tokens=2)
    async with openai.AsyncOpenAI(
        base_url=f"http://{service.http_address}/v1", api_key="none", timeout=PATIENCE, _strict_response_validation=True
    ) as made:
        yield made


def rendered(tokenizer, submit) -> str:
    return tokenizer.decode(list(submit.token_ids), skip_special_tokens=False)


async def test_a_response_and_the_same_as_a_stream(ai, scheduler, tokenizer):
    text = tokenizer.decode(list(range(1000, 1005)))
    made = await ai.responses.create(model=MODEL, input="Hello", instructions="Be brief.", max_output_tokens=9)
    assert (made.output_text, made.status, made.instructions) == (text, "completed", "Be brief.")
    assert made.usage.input_tokens_details.cached_tokens == 2
    assert made.usage.total_tokens == made.usage.input_tokens + 5
    stream = await ai.responses.create(
        model=MODEL, input=[{"role": "user", "content": "Hello"}], instructions="Be brief.", stream=True
    )
    events = [event async for event in stream]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events][:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert "".join(event.delta for event in deltas) == text
    final = events[-1].response
    assert (events[-1].type, final.output_text) == ("response.completed", text)
    assert {event.response.id for event in events if hasattr(event, "response")} == {final.id}
    assert {event.item_id for event in deltas} == {final.output[0].id}
    assert list(scheduler.submits[0].token_ids) == list(scheduler.submits[1].token_ids)
    async with ai.responses.stream(model=MODEL, input="Hello") as helped:
        assert (await helped.get_final_response()).output_text == text


async def test_what_is_cut_is_incomplete(ai, scheduler):
    scheduler.play = lambda submit: Script()
    made = await ai.responses.create(model=MODEL, input="Hello", max_output_tokens=3)
    assert (made.status, made.incomplete_details.reason) == ("incomplete", "max_output_tokens")


async def test_log_probabilities(ai):
    made = await ai.responses.create(
        model=MODEL, input="Hello", include=["message.output_text.logprobs"], top_logprobs=2
    )
    entries = made.output[0].content[0].logprobs
    assert [entry.logprob for entry in entries] == [0, -0.25, -0.5, -0.75, -1]
    assert [len(entry.top_logprobs) for entry in entries] == [2] * 5


async def test_conversations_branch_and_nothing_is_lost(ai, http, scheduler, tokenizer):
    first = await ai.responses.create(model=MODEL, input="One", instructions="Count.")
    branches = [
        await ai.responses.create(model=MODEL, input=word, previous_response_id=first.id) for word in ("Two", "Zwei")
    ]
    third = await ai.responses.create(model=MODEL, input="Three", previous_response_id=branches[0].id)
    prompts = [rendered(tokenizer, submit) for submit in scheduler.submits]
    assert "Count." in prompts[0]
    assert all("Count." not in prompt for prompt in prompts[1:])
    assert [[word in prompt for word in ("One", "Two", "Zwei", "Three")] for prompt in prompts[1:]] == [
        [True, True, False, False],
        [True, False, True, False],
        [True, True, False, True],
    ]
    assert prompts[3].count(first.output_text) == 2
    kept = await ai.responses.retrieve(third.id)
    assert kept.model_dump() == third.model_dump()
    noted = await http.get(f"/v1/sessions/{third.id}")
    assert noted.json["model"] == third.model, "what goes on from it goes to this model"
    items = [item async for item in ai.responses.input_items.list(third.id, order="asc")]
    assert [(item.role, item.content[0].text) for item in items] == [
        ("user", "One"),
        ("assistant", first.output_text),
        ("user", "Two"),
        ("assistant", branches[0].output_text),
        ("user", "Three"),
    ]
    with pytest.raises(openai.BadRequestError):
        await ai.responses.cancel(third.id)
    await ai.responses.delete(branches[0].id)
    with pytest.raises(openai.NotFoundError):
        await ai.responses.retrieve(branches[0].id)
    await ai.responses.create(model=MODEL, input="Four", previous_response_id=third.id)


async def test_what_is_not_to_be_kept_is_not(ai):
    made = await ai.responses.create(model=MODEL, input="Hello", store=False)
    assert made.store is False
    with pytest.raises(openai.NotFoundError):
        await ai.responses.retrieve(made.id)


@pytest.mark.parametrize(
    ("fields", "error", "param"),
    [
        ({"input": []}, openai.BadRequestError, "input"),
        ({"input": [{"type": "computer_call"}]}, openai.BadRequestError, "input[0].type"),
        ({"input": [{"role": "", "content": "a"}]}, openai.BadRequestError, "input[0].role"),
        (
            {"instructions": "Be brief.", "input": [{"role": "", "content": ""}]},
            openai.BadRequestError,
            "input[0].role",
        ),
        ({"top_p": 0}, openai.BadRequestError, "top_p"),
        ({"max_output_tokens": 0}, openai.BadRequestError, "max_output_tokens"),
        ({"previous_response_id": "resp_none"}, openai.NotFoundError, "previous_response_id"),
        ({"previous_response_id": "../x"}, openai.NotFoundError, "previous_response_id"),
        ({"tools": [{"type": "web_search"}]}, openai.BadRequestError, "tools[0].type"),
        ({"background": True, "store": False}, openai.BadRequestError, "store"),
        ({"text": {"format": {"type": "poem"}}}, openai.BadRequestError, "text.format.type"),
    ],
)
async def test_refusals_are_its_errors(ai, scheduler, fields, error, param):
    with pytest.raises(error) as caught:
        await ai.responses.create(**{"model": MODEL, "input": "Hello", **fields})
    assert caught.value.param == param
    assert scheduler.submits == []


async def test_a_session_is_no_response(ai, http):
    body = {"messages": [{"role": "user", "content": "Hi"}], "session_id": "no-response", "max_tokens": 1}
    assert (await http.post("/v1/chat/completions", body)).status == 200
    assert (await http.get("/v1/responses/no-response")).status == 404


async def test_an_error_in_a_stream_is_its_last_event(ai, scheduler):
    status = link_pb2.LinkStatus(code=14, message="the executor is gone")
    scheduler.play = lambda submit: Script(fail_after=2, delay=0.1, status=status)
    events = [event async for event in await ai.responses.create(model=MODEL, input="Hello", stream=True)]
    assert (events[-1].type, events[-1].message, events[-1].code) == ("error", "the executor is gone", "unavailable")
    assert events[-1].sequence_number == len(events) - 1


async def test_closing_a_stream_cancels_and_keeps_nothing(ai, scheduler):
    scheduler.play = lambda submit: Script(hold_after=2)
    stream = await ai.responses.create(model=MODEL, input="Hello", stream=True, max_output_tokens=9)
    begun = await anext(aiter(stream))
    await stream.close()
    await eventually(lambda: len(scheduler.aborts) == 1 and scheduler.num_running == 0)
    with pytest.raises(openai.NotFoundError):
        await ai.responses.retrieve(begun.response.id)
