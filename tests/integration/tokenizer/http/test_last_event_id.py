"""Streams of chats and completions that are left, and gone on with by the id of the last event."""

from __future__ import annotations

import asyncio
import json

import pytest
from openai._streaming import SSEDecoder

from scalellm.v1 import link_pb2
from scripted_scheduler import Script
from service_processes import eventually

CHAT = ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello"}]})
COMPLETE = ("/v1/completions", {"prompt": ["Hello", "Good day"], "echo": True, "logprobs": 1})
BODY = {"max_tokens": 30, "seed": 1, "stream": True, "on_disconnect": "keep"}


async def read(http, path, body, limit=None, last=None, **headers):
    """Read events as another one's decoder has them: `limit` of them, up to the place `last`, or all. Then leave."""
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    events = []
    async with http.session.post(http.base + path, json=body, headers=headers) as response:
        assert response.status == 200, await response.text()
        async for event in SSEDecoder().aiter_bytes(response.content.iter_any()):
            events.append(event)
            if len(events) == limit or (last is not None and event.id.endswith(last)):
                response.close()
                break
    return events


def choices(events):
    """Collect each choice from its events: text, log-probabilities and every finish reason that was told."""
    found = {}
    for event in events:
        if event.data == "[DONE]":
            continue
        for choice in json.loads(event.data)["choices"]:
            text, entries, reasons = found.setdefault(choice["index"], ([], [], []))
            text.append(choice["text"] if "text" in choice else choice["delta"].get("content", ""))
            if choice["logprobs"]:
                logprobs = choice["logprobs"]
                entries += logprobs.get("content") or zip(logprobs["text_offset"], logprobs["tokens"], strict=True)
            reasons += [choice["finish_reason"]] if choice["finish_reason"] else []
    return {index: ("".join(text), entries, reasons) for index, (text, entries, reasons) in found.items()}


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        (CHAT[0], {**CHAT[1], "n": 3}),
        (
            CHAT[0],
            {**CHAT[1], "logprobs": True, "prompt_logprobs": 0, "stream_options": {"include_usage": True}},
        ),
        (COMPLETE[0], {**COMPLETE[1], "n": 2}),
    ],
)
async def test_a_stream_that_was_left_goes_on(http, scheduler, path, asked):
    scheduler.play = lambda submit: Script(delay=0.003)
    body = {**BODY, **asked}
    undisturbed = await read(http, path, {**body, "on_disconnect": "cancel"})
    assert {event.id for event in undisturbed} == {None}
    scheduler.submits.clear()
    for limit in (5, 31):
        events = await read(http, path, body, limit)
        while events[-1].data != "[DONE]":
            ids = [event.id for event in events if event.id]
            events += await read(http, path, body, 23, last_event_id=ids[-1])
        assert choices(events) == choices(undisturbed)
        assert sum("prompt_logprobs" in event.data for event in events) == sum(
            "prompt_logprobs" in event.data for event in undisturbed
        )
        names = {json.loads(event.data)["id"] for event in events[:-1]}
        assert len(names) == 1
    assert len(scheduler.submits) == len({submit.request_id for submit in scheduler.submits}), "each ran once"


async def test_an_end_is_told_while_other_choices_run(http, scheduler):
    path, asked = CHAT
    go, tokens = asyncio.Event(), [[1000, 1001], list(range(1000, 1030))]
    scheduler.play = lambda submit: Script(samples=tokens, hold_after=5, go=go)
    body = {**BODY, **asked, "n": 2, "request_id": "one-ends-early"}
    events = await read(http, path, body, last="/2.,5")
    assert scheduler.num_running == 1
    assert [reasons for _, (_, _, reasons) in sorted(choices(events).items())] == [["length"], []]
    go.set()
    whole = choices(await read(http, path, body))
    ids = [event.id for event in events]
    at_end = next(number for number, event_id in enumerate(ids, 1) if "." in event_id)
    for number in (at_end - 1, at_end):  # who has not got the end, and who has
        rest = await read(http, path, body, last_event_id=ids[number - 1])
        assert choices(events[:number] + rest) == whole


async def test_an_answer_is_also_had_again_by_its_id(http, scheduler):
    path, asked = CHAT
    body = {**BODY, **asked, "request_id": "kept-by-http"}
    scheduler.play = lambda submit: Script(delay=0.003)
    await read(http, path, body, 3)
    whole = await http.post(path, {**body, "stream": True})
    await eventually(lambda: scheduler.num_running == 0)
    document = await http.post(path, {**body, "stream": False})
    text = document.json["choices"][0]["message"]["content"]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in whole.events[:-1]) == text
    assert len(scheduler.submits) == 1
    other = await http.post(path, {**body, "max_tokens": 29})
    assert (other.status, other.error["code"]) == (409, "already_exists")


async def test_what_runs_without_a_client_is_cancelled_by_its_id(http, scheduler):
    path, asked = CHAT
    scheduler.play = lambda submit: Script(hold_after=5)
    events = await read(http, path, {**BODY, **asked}, 4)
    request_id = events[-1].id.partition("/")[0]
    assert scheduler.num_running == 1
    for _ in range(2):  # what has ended stays ended
        reply = await http.post(f"/v1/requests/{request_id}/cancel", {})
        assert (reply.status, reply.json) == (200, {"id": request_id, "object": "request", "status": "ended"})
    await eventually(lambda: scheduler.num_running == 0)
    assert [abort.reason for abort in scheduler.aborts] == [link_pb2.ABORT_REASON_CANCELLED]
    rest = await read(http, path, {**BODY, **asked}, last_event_id=events[-1].id)
    assert json.loads(rest[-1].data)["error"]["code"] == "cancelled"
    for gone, status in (("no-such", 404), ("no%20id", 400)):
        assert (await http.post(f"/v1/requests/{gone}/cancel", {})).status == status


@pytest.mark.parametrize(
    ("event_id", "fields", "status"),
    [
        ("", {}, 400),
        ("no such id", {}, 400),
        ("a/1,", {}, 400),
        ("a/1,2", {}, 400),
        ("a/1+", {}, 400),
        ("a/1.+2", {}, 400),
        ("a/1", {"n": 2**32 - 1}, 400),
        ("a/1", {"request_id": "b"}, 400),
        ("a/1", {"on_disconnect": "cancel"}, 400),
        ("a/1", {"stream": False}, 400),
        ("a/1", {}, 404),
    ],
)
async def test_places_that_are_none_are_refused(http, scheduler, event_id, fields, status):
    path, asked = CHAT
    reply = await http.post(path, {**BODY, **asked, **fields}, last_event_id=event_id)
    assert (reply.status, scheduler.submits) == (status, [])
    assert status == 404 or reply.error["message"].startswith("last-event-id: ")
    refused = await http.post(path, {**asked, "on_disconnect": "drop"})
    assert (refused.status, refused.error["param"]) == (400, "on_disconnect")
