"""Responses that outlive their calls, with OpenAI's own client: streams left and gone on with, background, cancel."""

from __future__ import annotations

import asyncio

import openai
import pytest
import pytest_asyncio

from scalellm.v1 import link_pb2
from scripted_scheduler import Script
from service_processes import PATIENCE, eventually

MODEL = "smollm2-135m-instruct"
KEEP = {"on_disconnect": "keep"}


@pytest_asyncio.fixture(loop_scope="session")
async def ai(service, client, scheduler):
    scheduler.play = lambda submit: Script(delay=0.003)
    async with openai.AsyncOpenAI(
        base_url=f"http://{service.http_address}/v1", api_key="none", timeout=PATIENCE, _strict_response_validation=True
    ) as made:
        yield made


async def left(stream, num_deltas: int):
    """The first events of a stream, up to so many with text; then the client leaves."""
    events = []
    async for event in stream:
        events.append(event)
        if sum(event.type == "response.output_text.delta" for event in events) == num_deltas:
            break
    await stream.close()
    return events


def text_of(events) -> str:
    return "".join(event.delta for event in events if event.type == "response.output_text.delta")


@pytest.mark.parametrize("fields", [{"background": True}, {"extra_body": KEEP}])
async def test_a_stream_that_was_left_goes_on(ai, scheduler, fields):
    asked = {"model": MODEL, "input": "Hello", "max_output_tokens": 60, "top_logprobs": 1, "metadata": {"a": "b"}}
    include = ["message.output_text.logprobs"]
    for num_deltas in (0, 1, 7, 40):
        stream = await ai.responses.create(**asked, include=include, stream=True, **fields)
        events = await left(stream, num_deltas or 1) if num_deltas else [await anext(aiter(stream))]
        await stream.close()
        response_id = events[0].response.id
        while events[-1].type != "response.incomplete":
            last = events[-1].sequence_number
            rest = await ai.responses.retrieve(response_id, stream=True, starting_after=last)
            events += await left(rest, 13)
        numbers = [event.sequence_number for event in events]
        assert numbers == sorted(set(numbers))
        assert {event.response.id for event in events if hasattr(event, "response")} == {response_id}
        final = events[-1].response
        assert final.output_text == text_of(events)
        assert [event.text for event in events if event.type == "response.output_text.done"] == [final.output_text]
        entries = [entry for event in events if event.type.endswith("text.delta") for entry in event.logprobs]
        assert [entry.logprob for entry in entries] == [-token / 4 for token in range(60)]
        assert len({event.item_id for event in events if hasattr(event, "item_id")} | {final.output[0].id}) == 1
        assert (final.metadata, final.background) == ({"a": "b"}, "background" in fields)
    # All over again, and without a call that was disturbed.
    whole = await ai.responses.retrieve(response_id, stream=True, starting_after=None)
    again = [event async for event in whole]
    assert text_of(again) == final.output_text
    assert again[-1] == events[-1].model_copy(update={"sequence_number": again[-1].sequence_number})
    assert (await ai.responses.retrieve(response_id)).model_dump() == final.model_dump()
    assert len(scheduler.submits) == 4, "nothing ran twice"
    assert scheduler.aborts == []


async def test_a_background_response_is_asked_for_until_it_is_complete(ai, scheduler):
    made = await ai.responses.create(model=MODEL, input="Hello", max_output_tokens=40, background=True)
    assert (made.status, made.output, made.background) == ("in_progress", [], True)
    while (now := await ai.responses.retrieve(made.id)).status == "in_progress":
        pass
    assert (now.status, now.usage.output_tokens, now.created_at) == ("incomplete", 40, made.created_at)
    assert now.store is True
    behind = await ai.responses.create(model=MODEL, input="More", max_output_tokens=5, previous_response_id=made.id)
    items = [item async for item in ai.responses.input_items.list(behind.id, order="asc")]
    assert [item.content[0].text for item in items] == ["Hello", now.output_text, "More"]
    assert (await ai.responses.cancel(made.id)).status == "incomplete", "it had ended"
    await ai.responses.delete(made.id)
    for gone in (ai.responses.retrieve(made.id), ai.responses.delete(made.id), ai.responses.cancel(made.id)):
        with pytest.raises(openai.NotFoundError):
            await gone


async def test_a_response_that_runs_is_cancelled_once(ai, scheduler):
    scheduler.play = lambda submit: Script(delay=0.002, hold_after=5)
    stream = await ai.responses.create(model=MODEL, input="Hello", max_output_tokens=9, background=True, stream=True)
    events = await left(stream, 5)
    response_id = events[0].response.id
    with pytest.raises(openai.BadRequestError) as error:
        await ai.responses.create(model=MODEL, input="More", previous_response_id=response_id)
    assert error.value.param == "previous_response_id"
    for _ in range(2):
        cancelled = await ai.responses.cancel(response_id)
        assert (cancelled.status, cancelled.output_text) == ("cancelled", text_of(events))
    await eventually(lambda: scheduler.num_running == 0)
    assert [abort.reason for abort in scheduler.aborts] == [link_pb2.ABORT_REASON_CANCELLED]
    rest = await ai.responses.retrieve(response_id, stream=True, starting_after=events[-1].sequence_number)
    (last,) = [event async for event in rest]
    assert (last.type, last.code, last.sequence_number) == ("error", "cancelled", events[-1].sequence_number + 1)


async def test_a_response_that_failed_says_so(ai, scheduler):
    status = link_pb2.LinkStatus(code=8, message="the queue is full", retry_after_ns=10**9)
    go = asyncio.Event()
    scheduler.play = lambda submit: Script(go=go, fail_after=0, status=status)
    made = await ai.responses.create(model=MODEL, input="Hello", background=True)
    assert (await ai.responses.retrieve(made.id)).status == "in_progress"
    go.set()
    while (now := await ai.responses.retrieve(made.id)).status == "in_progress":
        pass
    assert (now.status, now.error.code, now.error.message) == ("failed", "rate_limit_exceeded", "the queue is full")


async def test_what_is_not_kept_is_not_streamed_later(ai, http):
    made = await ai.responses.create(model=MODEL, input="Hello", max_output_tokens=3)
    for path, status, param in (
        (f"{made.id}?stream=true", 400, "stream"),
        ("resp_none?stream=true", 404, "response_id"),
        (f"{made.id}?stream=true&starting_after=-1", 400, "starting_after"),
    ):
        reply = await http.get(f"/v1/responses/{path}")
        assert (reply.status, reply.error["param"]) == (status, param)
    body = {"prompt": "Hello", "max_tokens": 3, "on_disconnect": "keep", "request_id": "no-response-either"}
    assert (await http.post("/v1/completions", body)).status == 200
    assert (await http.get("/v1/responses/no-response-either")).status == 404
