"""Answers of OpenAI's /v1/responses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Any

import grpc
from google.protobuf.json_format import MessageToDict

from scalellm.v1 import common_pb2, generation_pb2
from services.common.errors import StatusError
from services.common.field_rules import SAMPLING
from services.tokenizer.http.errors import error_code
from services.tokenizer.http.logprobs import chat_entries
from services.tokenizer.http.responses_request import ResponsesRequest
from services.tokenizer.http.wire import dump, latency_json, quote
from services.tokenizer.sample_stream import Delta
from services.tokenizer.text.detokenizer import TokenTexts

HEAD_EVENTS = 4
"""Events of a stream before those with text. That of a kept one with the text up to token k has the number
HEAD_EVENTS - 1 + k."""

_UNFINISHED = MappingProxyType({"cancelled": "incomplete", "failed": "incomplete"})


class ResponseDocument:
    """The answer in one. Made twice of the same, it says the same.

    Args:
        request: What was asked.
        response_id: Its id.
        created_at: Seconds since the epoch.
        model: Name of the model.
        texts: What tokens mean.
        sampling: How they are drawn, the model's own settings included.
        is_stored: True if it will be stored.
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
    ) -> None:
        self.request = request
        self.message_id = f"msg_{response_id.removeprefix('resp_')}"
        self._texts = texts
        self._num_top = request.top_logprobs or 0
        self._parts: list[str] = []
        self._logprobs: list[str] = []
        used = MessageToDict(
            sampling, preserving_proto_field_name=True
        )  # the shortest text of a float32, as it was given
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
            "parallel_tool_calls": True,
            "previous_response_id": request.previous_response_id,
            "reasoning": {"effort": request.reasoning and request.reasoning.effort, "summary": None},
            "store": is_stored,
            "temperature": used.get("temperature", SAMPLING["temperature"].default),
            "text": {"format": request.text_format},
            "tool_choice": "auto",
            "tools": [],
            "top_logprobs": self._num_top,
            "top_p": used.get("top_p", SAMPLING["top_p"].default),
            "truncation": "disabled",
            "usage": None,
            "user": request.user,
        }

    @property
    def text(self) -> str:
        """All of the answer's text so far."""
        return "".join(self._parts)

    def start(self, prompt: int, started: generation_pb2.Started) -> str:
        """Nothing. Raises StatusError where a background response cannot be kept."""
        if self.request.background and not started.resumable:
            raise StatusError.unavailable("background: the response cannot be kept now, Redis is away or full", 1.0)
        return ""

    def prompt_logprobs(self, prompt: int, part: generation_pb2.PromptLogprobs) -> str:
        """Nobody asks for them."""
        return ""

    def delta(self, prompt: int, delta: Delta) -> str:
        """Kept."""
        self.keep(delta)
        return ""

    def keep(self, delta: Delta) -> str:
        """Keep a part, and return its log-probabilities, with commas in between."""
        self._parts.append(delta.text)
        if delta.logprobs is None or not delta.token_ids:
            return ""
        entries = chat_entries(delta.token_ids, delta.logprobs, self._texts, self._num_top)
        self._logprobs.append(entries)
        return entries

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
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }
        self.response["latency"] = json.loads(latency_json(finished))

    def fail(self, error: StatusError) -> None:
        """Make the response one that did not finish."""
        is_cancelled = error.code is grpc.StatusCode.CANCELLED
        self.response["status"] = "cancelled" if is_cancelled else "failed"
        if not is_cancelled:
            is_limit = error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
            code = "rate_limit_exceeded" if is_limit else "server_error"  # OpenAI's list is closed
            self.response["error"] = {"code": code, "message": error.message}

    def end(self, finished: Sequence[generation_pb2.Finished]) -> str:
        """The document."""
        return self.whole()

    def whole(self) -> str:
        """The response with its output, which it has once it ended."""
        if self.response["status"] == "in_progress":
            return dump(self.response)
        rest = {name: value for name, value in self.response.items() if name != "output"}
        return f'{dump(rest)[:-1]},"output":[{self.item()}]}}'

    def item(self) -> str:
        """The one item of the output."""
        status = self.response["status"]
        status = _UNFINISHED.get(status, status)
        return (
            f'{{"id":"{self.message_id}","type":"message","status":"{status}","role":"assistant",'
            f'"content":[{self.part()}]}}'
        )

    def part(self) -> str:
        """The one part of the item."""
        return f'{{"type":"output_text","text":{quote(self.text)},"annotations":[],"logprobs":[{self.logprobs}]}}'

    @property
    def logprobs(self) -> str:
        """All log-probabilities so far, with commas in between."""
        return ",".join(self._logprobs)


class ResponseStream(ResponseDocument):
    """The answer as events. Arguments as for ResponseDocument.

    Events are numbered. Where the response is kept, the number of an event follows from the tokens before it, however
    they come, so that a client can go on from it: numbers are left out where one event has the text of several tokens.

    Attributes:
        starting_after: Events up to this number are left out.
    """

    starting_after = -1
    _number = -1
    _num_tokens = 0

    @cached_property
    def _place(self) -> str:
        return f'"item_id":"{self.message_id}","output_index":0,"content_index":0'

    @property
    def _token_number(self) -> int:
        """What follows the last token has a number behind this one."""
        return HEAD_EVENTS - 1 + self._num_tokens if self.request.is_kept else 0

    def _event(self, name: str, rest: str, number: int = 0) -> str:
        self._number = max(self._number + 1, number)
        if self._number <= self.starting_after:
            return ""
        return f'event: {name}\ndata: {{"type":"{name}","sequence_number":{self._number},{rest}}}\n\n'

    def start(self, prompt: int, started: generation_pb2.Started) -> str:
        """The response begins, and its only item, and the only part of that."""
        super().start(prompt, started)
        begun = f'"response":{dump(self.response)}'
        item = f'{{"id":"{self.message_id}","type":"message","status":"in_progress","role":"assistant","content":[]}}'
        part = '{"type":"output_text","text":"","annotations":[],"logprobs":[]}'
        return (
            self._event("response.created", begun)
            + self._event("response.in_progress", begun)
            + self._event("response.output_item.added", f'"output_index":0,"item":{item}')
            + self._event("response.content_part.added", f'{self._place},"part":{part}')
        )

    def delta(self, prompt: int, delta: Delta) -> str:
        """More text."""
        logprobs = self.keep(delta)
        self._num_tokens += delta.num_tokens
        if not delta.text and not logprobs:
            return ""
        return self._event(
            "response.output_text.delta",
            f'{self._place},"delta":{quote(delta.text)},"logprobs":[{logprobs}]',
            self._token_number,
        )

    def end(self, finished: Sequence[generation_pb2.Finished]) -> str:
        """The part ends, the item, and the response."""
        self._number = max(self._number, self._token_number)
        name = "response.completed" if self.response["status"] == "completed" else "response.incomplete"
        return (
            self._event(
                "response.output_text.done", f'{self._place},"text":{quote(self.text)},"logprobs":[{self.logprobs}]'
            )
            + self._event("response.content_part.done", f'{self._place},"part":{self.part()}')
            + self._event("response.output_item.done", f'"output_index":0,"item":{self.item()}')
            + self._event(name, f'"response":{self.whole()}')
        )

    def failed(self, error: StatusError) -> bytes:
        """The last event of a stream that failed."""
        rest = f'"code":{quote(error_code(error))},"message":{quote(error.message)},"param":{dump(error.field or None)}'
        return self._event("error", rest, self.starting_after + 1).encode()
