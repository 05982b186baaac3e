"""Answers of OpenAI's /v1/responses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

import grpc
from google.protobuf.json_format import MessageToDict

from scalellm.services.common.errors import StatusError
from scalellm.services.common.field_rules import SAMPLING
from scalellm.services.tokenizer.dialect import Part, PartKind
from scalellm.services.tokenizer.http.answer_format import Format
from scalellm.services.tokenizer.http.errors import error_code
from scalellm.services.tokenizer.http.logprobs import chat_entries
from scalellm.services.tokenizer.http.responses_items import OutputItem
from scalellm.services.tokenizer.http.responses_request import ResponsesRequest
from scalellm.services.tokenizer.http.wire import dump, latency_json, quote
from scalellm.services.tokenizer.message import Message
from scalellm.services.tokenizer.sample_stream import Delta, parts_of
from scalellm.services.tokenizer.text.detokenizer import TokenTexts
from scalellm.v1 import common_pb2, generation_pb2

_HEAD_EVENTS = 4
"""Number of events of a stream before those with text, if the answer is only text. In a kept stream, the event with the
text up to token k has the number _HEAD_EVENTS - 1 + k."""

_NUMBERS_PER_TOKEN = 16
"""Sequence numbers per token. Where reasoning and calls are told apart, a token may begin or end several items: events
up to token k of a kept stream have at most the number 1 + _NUMBERS_PER_TOKEN * k."""

_NO_TEXT = Part(PartKind.TEXT, "")

_UNFINISHED = MappingProxyType({"cancelled": "incomplete", "failed": "incomplete"})


class ResponseDocument(Format):
    """The answer as one document. The same arguments and events give the same document.

    Args:
        request: The client's request.
        response_id: Its id.
        created_at: Seconds since the epoch.
        model: Name of the model.
        texts: Texts of the model's tokens.
        sampling: Sampling parameters, the model's own settings included.
        is_stored: True if it will be stored.
        has_items: True if reasoning and calls are items of their own.
    """

    def __init__(
        self,
        request: ResponsesRequest,
        response_id: str,
        created_at: int,
        model: str,
        texts: TokenTexts,
        sampling: common_pb2.SamplingParams,
        *,
        is_stored: bool,
        has_items: bool,
    ) -> None:
        self.request = request
        self.has_items = has_items
        self.items: list[OutputItem] = []
        self.parts: list[Part] = []
        if not has_items:
            self._begin_item(_NO_TEXT, response_id)
        self._texts = texts
        self._num_top = request.top_logprobs or 0
        used = MessageToDict(
            sampling, preserving_proto_field_name=True
        )  # the shortest text of the float32, which is the number as the client wrote it
        self.response: dict[str, Any] = {
            "id": response_id,
            "object": "response",
            "created_at": created_at,
            "status": "in_progress",
            "background": bool(request.background),
            "error": None,
            "incomplete_details": None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {},
            "model": model,
            "output": [],
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": request.previous_response_id,
            "reasoning": {"effort": request.reasoning and request.reasoning.effort, "summary": None},
            "store": is_stored,
            "temperature": used.get("temperature", SAMPLING["temperature"].default),
            "text": {"format": request.text_format},
            "tool_choice": request.tool_choice or "auto",
            "tools": [{"strict": True, "parameters": None, **tool} for tool in request.tools or ()],
            "top_logprobs": self._num_top,
            "top_p": used.get("top_p", SAMPLING["top_p"].default),
            "truncation": "disabled",
            "usage": None,
            "user": request.user,
        }

    @property
    def answer(self) -> Message:
        """The answer so far, as a message."""
        return Message.answer(self.parts)

    def start(self, prompt: int, started: generation_pb2.Started) -> str:
        """Return no text. Raises StatusError if a background response cannot be kept."""
        if self.request.background and not started.resumable:
            raise StatusError.unavailable("background: the response cannot be kept now, Redis is away or full", 1.0)
        return ""

    def delta(self, prompt: int, delta: Delta) -> str:
        """Keep the parts for the document."""
        for part in parts_of(delta):
            self.add(part)
        self.keep(delta)
        return ""

    def keep(self, delta: Delta) -> str:
        """Add the log-probabilities of a delta to the current message, and return them, with commas in between."""
        if delta.logprobs is None or not delta.token_ids or not self.items or self.items[-1].kind is not PartKind.TEXT:
            return ""
        entries = chat_entries(delta.token_ids, delta.logprobs, self._texts, self._num_top)
        self.items[-1].logprobs.append(entries)
        return entries

    def add(self, part: Part) -> bool:
        """Keep a part. Returns whether it begins an item."""
        is_new = not self.items or not self.items[-1].has_more(part)
        if is_new:
            self._begin_item(part, self.response["id"])
        self.items[-1].texts.append(part.text)
        self.parts.append(part)
        return is_new

    def _begin_item(self, part: Part, response_id: str) -> None:
        self.items.append(OutputItem.begin(part, len(self.items), response_id))

    def finish(self, finished: Sequence[generation_pb2.Finished]) -> None:
        """Make the response complete, but for its output."""
        (last,) = finished
        usage, is_cut = last.usage, last.samples[0].reason == common_pb2.FINISH_REASON_LENGTH
        self.response["status"] = "incomplete" if is_cut else "completed"
        self.response["incomplete_details"] = {"reason": "max_output_tokens"} if is_cut else None
        self.response["usage"] = {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }
        self.response["latency"] = json.loads(latency_json(finished))

    def fail(self, error: StatusError) -> None:
        """Mark the response as failed or cancelled."""
        is_cancelled = error.code is grpc.StatusCode.CANCELLED
        self.response["status"] = "cancelled" if is_cancelled else "failed"
        if not is_cancelled:
            is_limit = error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
            code = "rate_limit_exceeded" if is_limit else "server_error"  # OpenAI's list is closed
            self.response["error"] = {"code": code, "message": error.message}

    def end(self, finished: Sequence[generation_pb2.Finished]) -> str:
        """Return the document."""
        return self.whole()

    def whole(self) -> str:
        """Return the response as JSON, with its output once it has ended."""
        if self.response["status"] == "in_progress":
            return dump(self.response)
        rest = {name: value for name, value in self.response.items() if name != "output"}
        if not self.items:
            self._begin_item(_NO_TEXT, self.response["id"])
        items = [item.json("completed") for item in self.items[:-1]]
        return f'{dump(rest)[:-1]},"output":[{",".join([*items, self.items[-1].json(self._status)])}]}}'

    @property
    def _status(self) -> str:
        """Return the status of the last item, once the response has ended."""
        status: str = self.response["status"]
        return _UNFINISHED.get(status, status)


class ResponseStream(ResponseDocument):
    """The answer as events. Arguments as for ResponseDocument.

    Events are numbered. In a kept response, the number of an event depends only on the number of tokens before it, so
    that a client can resume from it. Numbers are skipped if one event has the text of several tokens. If there are
    items, Deltas of a kept response have one token each (`Answer.by_token`), because a client may resume between the
    events of one token.

    Attributes:
        starting_after: Events up to this number are left out.
    """

    starting_after = -1
    _number = -1
    _num_tokens = 0

    @property
    def _place(self) -> str:
        """Return the JSON fields that identify the current item in an event."""
        return f'"item_id":"{self.items[-1].item_id}","output_index":{len(self.items) - 1}'

    @property
    def _token_number(self) -> int:
        """Return the sequence number of the last token; events that follow it have higher ones."""
        if not self.request.is_kept:
            return 0
        return 1 + _NUMBERS_PER_TOKEN * self._num_tokens if self.has_items else _HEAD_EVENTS - 1 + self._num_tokens

    def tokens_before(self, number: int) -> int:
        """Return how many tokens a client has that has received a kept stream's events up to this number."""
        return max(0, (number - 1) // _NUMBERS_PER_TOKEN if self.has_items else number - _HEAD_EVENTS + 1)

    def _event(self, name: str, rest: str, number: int = 0) -> str:
        self._number = max(self._number + 1, number)
        if self._number <= self.starting_after:
            return ""
        return f'event: {name}\ndata: {{"type":"{name}","sequence_number":{self._number},{rest}}}\n\n'

    def start(self, prompt: int, started: generation_pb2.Started) -> str:
        """Return the events for the beginning of the response, and of its item if it is only text."""
        super().start(prompt, started)
        begun = f'"response":{dump(self.response)}'
        head = self._event("response.created", begun) + self._event("response.in_progress", begun)
        return head if self.has_items else head + self._opened()

    def delta(self, prompt: int, delta: Delta) -> str:
        """Return the events for more text of an item, or for new items."""
        if not self.has_items:
            return self._text_alone(delta)
        events = []
        for part in parts_of(delta):
            before = self.items[-1] if self.items else None
            is_new = before is None or not before.has_more(part)
            if is_new and before is not None:
                events.append(self._closed("completed"))
            self.add(part)
            if is_new:
                events.append(self._opened())
            if part.text:
                events.append(self._more(part.text))
        self.keep(delta)
        self._num_tokens += delta.num_tokens
        self._number = max(self._number, self._token_number)
        return "".join(events)

    def _text_alone(self, delta: Delta) -> str:
        self.add(Part(PartKind.TEXT, delta.text))
        logprobs = self.keep(delta)
        self._num_tokens += delta.num_tokens
        if not delta.text and not logprobs:
            return ""
        return self._more(delta.text, logprobs, self._token_number)

    def end(self, finished: Sequence[generation_pb2.Finished]) -> str:
        """Return the events for the end of the last item and of the response."""
        self._number = max(self._number, self._token_number)
        name = "response.completed" if self.response["status"] == "completed" else "response.incomplete"
        begun = ""
        if not self.items:
            self._begin_item(_NO_TEXT, self.response["id"])
            begun = self._opened()
        return begun + self._closed(self._status) + self._event(name, f'"response":{self.whole()}')

    def _opened(self) -> str:
        """Return the events with which an item begins."""
        item = self.items[-1]
        index = f'"output_index":{len(self.items) - 1}'
        added = self._event("response.output_item.added", f'{index},"item":{item.json("in_progress", is_empty=True)}')
        if item.kind is PartKind.CALL:
            return added
        part = item.part(is_empty=True)
        return added + self._event("response.content_part.added", f'{self._place},"content_index":0,"part":{part}')

    def _more(self, text: str, logprobs: str = "", number: int = 0) -> str:
        rest = f'{self._place},"delta":{quote(text)}'
        match self.items[-1].kind:
            case PartKind.CALL:
                return self._event("response.function_call_arguments.delta", rest, number)
            case PartKind.REASONING:
                return self._event("response.reasoning_text.delta", f'{rest},"content_index":0', number)
        rest = f'{rest},"content_index":0,"logprobs":[{logprobs}]'
        return self._event("response.output_text.delta", rest, number)

    def _closed(self, status: str) -> str:
        """Return the events with which an item ends."""
        item, place = self.items[-1], self._place
        if item.kind is PartKind.CALL:
            rest = f'{place},"name":{quote(item.name)},"arguments":{quote(item.text)}'
            done = self._event("response.function_call_arguments.done", rest)
        else:
            place += ',"content_index":0'
            text = f'{place},"text":{quote(item.text)}'
            if item.kind is PartKind.REASONING:
                done = self._event("response.reasoning_text.done", text)
            else:
                done = self._event("response.output_text.done", f'{text},"logprobs":[{",".join(item.logprobs)}]')
            done += self._event("response.content_part.done", f'{place},"part":{item.part()}')
        index = f'"output_index":{len(self.items) - 1}'
        return done + self._event("response.output_item.done", f'{index},"item":{item.json(status)}')

    def failed(self, error: StatusError) -> bytes:
        """Return the last event of a stream that failed."""
        rest = f'"code":{quote(error_code(error))},"message":{quote(error.message)},"param":{dump(error.field or None)}'
        return self._event("error", rest, self.starting_after + 1).encode()
