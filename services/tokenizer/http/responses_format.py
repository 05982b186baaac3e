"""Answers of OpenAI's /v1/responses."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from typing import Any

from scalellm.v1 import common_pb2, generation_pb2
from services.common.errors import StatusError
from services.tokenizer.http.errors import error_code
from services.tokenizer.http.logprobs import chat_entries
from services.tokenizer.http.responses_request import ResponsesRequest
from services.tokenizer.http.wire import dump, latency_json, quote
from services.tokenizer.sample_stream import Delta
from services.tokenizer.text.detokenizer import TokenTexts


class ResponseDocument:
    """The answer in one.

    Args:
        request: What was asked.
        response_id: Its id.
        model: Name of the model.
        texts: What tokens mean.
        is_stored: Whether it will be kept.
    """

    def __init__(
        self, request: ResponsesRequest, response_id: str, model: str, texts: TokenTexts, *, is_stored: bool
    ) -> None:
        self.request = request
        self.message_id = f"msg_{secrets.token_hex(16)}"
        self._texts = texts
        self._num_top = request.top_logprobs or 0
        self._parts: list[str] = []
        self._logprobs: list[str] = []
        self.response: dict[str, Any] = {
            "id": response_id,
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {},
            "model": model,
            "output": [],
            "parallel_tool_calls": True,
            "previous_response_id": request.previous_response_id,
            "reasoning": {"effort": None, "summary": None},
            "store": is_stored,
            "temperature": 1.0 if request.temperature is None else request.temperature,
            "text": {"format": request.text_format},
            "tool_choice": "auto",
            "tools": [],
            "top_logprobs": self._num_top,
            "top_p": 1.0 if request.top_p is None else request.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": request.user,
        }

    @property
    def text(self) -> str:
        """All of the answer's text so far."""
        return "".join(self._parts)

    def start(self, prompt: int, started: generation_pb2.Started) -> str:
        """Nothing."""
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

    def end(self, finished: Sequence[generation_pb2.Finished]) -> str:
        """The document."""
        return self.whole()

    def whole(self) -> str:
        """The response with its output."""
        rest = {name: value for name, value in self.response.items() if name != "output"}
        return f'{dump(rest)[:-1]},"output":[{self.item()}]}}'

    def item(self) -> str:
        """The one item of the output."""
        status = self.response["status"]
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
    """The answer as events. Arguments as for ResponseDocument."""

    def __init__(
        self, request: ResponsesRequest, response_id: str, model: str, texts: TokenTexts, *, is_stored: bool
    ) -> None:
        super().__init__(request, response_id, model, texts, is_stored=is_stored)
        self._sequence = 0
        self._place = f'"item_id":"{self.message_id}","output_index":0,"content_index":0'

    def _event(self, name: str, rest: str) -> str:
        self._sequence += 1
        return f'event: {name}\ndata: {{"type":"{name}","sequence_number":{self._sequence - 1},{rest}}}\n\n'

    def start(self, prompt: int, started: generation_pb2.Started) -> str:
        """The response begins, and its only item, and the only part of that."""
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
        if not delta.text and not logprobs:
            return ""
        return self._event(
            "response.output_text.delta", f'{self._place},"delta":{quote(delta.text)},"logprobs":[{logprobs}]'
        )

    def end(self, finished: Sequence[generation_pb2.Finished]) -> str:
        """The part ends, the item, and the response."""
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
        return self._event("error", rest).encode()
