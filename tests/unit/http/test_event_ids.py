"""Ids of events: whatever event a client has last, it is sent the rest, each text and each end once."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import pytest

from scalellm.services.tokenizer.dialect import Part, PartKind
from scalellm.services.tokenizer.http.answer_format import Format
from scalellm.services.tokenizer.http.chat_format import ChatStream
from scalellm.services.tokenizer.http.chat_request import ChatRequest
from scalellm.services.tokenizer.http.completion_format import CompletionStream
from scalellm.services.tokenizer.http.completion_request import CompletionRequest
from scalellm.services.tokenizer.http.event_ids import ChoicePlace, NumberedFormat, Place
from scalellm.services.tokenizer.sample_stream import Delta
from scalellm.v1 import common_pb2, generation_pb2

STARTED = generation_pb2.Started(request_id="r", resumable=True)
WORDS = (("one", "two"), ("",), ("a", "b", "c", "d", "e"))
"""Text of each token, by sample."""
PARTS = ((PartKind.REASONING, "so"), (PartKind.TEXT, "then"), (PartKind.CALL, "{}"))
"""Parts that each token brings, where parts are told apart."""
TURNS = (0, 2, 2, 0, 1, 2, 2, 2)
"""Sample of each token, in the order in which they come."""


def deltas(index: int, start: int, stop: int, *, has_parts: bool) -> Iterator[Delta]:
    """Make the deltas of some tokens of a sample: one, but one per token where there are parts."""
    for first, last in [(k, k + 1) for k in range(start, stop)] if has_parts else [(start, stop)]:
        text, end = "".join(WORDS[index][first:last]), None
        if last == len(WORDS[index]):
            end = generation_pb2.SampleFinished(index=index, reason=common_pb2.FINISH_REASON_STOP)
        parts = [Part(kind, part) for kind, part in PARTS] if has_parts else None
        yield Delta(index, text, first, last - first, parts=parts, finished=end)


def make_format(shape: str, seen: Sequence[ChoicePlace] | None) -> NumberedFormat:
    fields = {"n": 3, "stream": True}
    format: Format
    if shape == "completion":
        completion = CompletionRequest.read({**fields, "prompt": "x", "echo": True}, is_strict=False)
        format = CompletionStream(completion, "id", "model", None, ["echo "])  # type: ignore[arg-type]
    else:
        chat = ChatRequest.read({**fields, "messages": [{"role": "user", "content": "x"}]}, is_strict=False)
        format = ChatStream(chat, "id", "model", None, "echo ")  # type: ignore[arg-type]
    return NumberedFormat(format, "r", 1, 3, None if seen is None else [seen])


def stream(shape: str, seen: Sequence[ChoicePlace] | None = None) -> list[str]:
    """Return the events of an answer, or of its rest, but for those behind the ends of all choices."""
    coming: list[Delta] = []
    if seen is None:
        places = [0] * len(WORDS)
        for index in TURNS:
            coming += deltas(index, places[index], places[index] + 1, has_parts=shape == "parts")
            places[index] += 1
    else:  # an answer that is over: what the client has, and all of the rest
        for index, place in enumerate(seen):
            for start, stop in ((0, place.num_tokens), (place.num_tokens, len(WORDS[index]))):
                coming += deltas(index, start, stop, has_parts=shape == "parts") if start < stop else ()
    format = make_format(shape, seen)
    text = format.start(0, STARTED)
    for delta in coming:
        text += format.delta(0, delta)
        text += format.sample_end(0, delta.finished) if delta.finished is not None else ""
    return text.split("\n\n")[:-1]


def place_of(event: str) -> Sequence[ChoicePlace]:
    (seen,) = Place.read(event.rpartition("id: ")[2]).seen(1, len(WORDS))
    return seen


def said(events: Sequence[str]) -> dict[int, list[str]]:
    """Collect each choice from its events: its kinds of text, and every finish reason that was told."""
    found: dict[int, list[str]] = {}
    for event in events:
        (choice,) = json.loads(event.partition("data: ")[2].partition("\n")[0])["choices"]
        delta = choice.get("delta", {"content": choice.get("text")})
        kinds = found.setdefault(choice["index"], [""] * 4)
        kinds[0] += delta.get("content", "")
        kinds[1] += delta.get("reasoning_content", "")
        kinds[2] += "".join(call["function"]["arguments"] for call in delta.get("tool_calls", ()))
        kinds[3] += choice["finish_reason"] or ""
    return found


@pytest.mark.parametrize("shape", ["chat", "parts", "completion"])
def test_any_event_may_be_the_last_one_before_a_break(shape: str) -> None:
    whole = stream(shape)
    answer = said(whole)
    assert [answer[index][3] for index in range(len(WORDS))] == ["stop"] * len(WORDS)
    assert len({event.rpartition("id: ")[2] for event in whole}) == len(whole), "each has an id of its own"
    for count in range(1, len(whole) + 1):
        rest = stream(shape, place_of(whole[count - 1]))
        assert said([*whole[:count], *rest]) == answer
        for more in range(1, len(rest) + 1):  # and a second break
            last = stream(shape, place_of(rest[more - 1]))
            assert said([*whole[:count], *rest[:more], *last]) == answer
