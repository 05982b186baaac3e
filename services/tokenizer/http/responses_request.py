"""Requests of OpenAI's /v1/responses."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Any

import grpc

from scalellm.services.common.errors import StatusError
from scalellm.services.common.sent_text import as_text
from scalellm.services.tokenizer.http.api_request import ApiRequest, OnDisconnect, UInt32, set_present
from scalellm.services.tokenizer.http.responses_items import messages_of
from scalellm.services.tokenizer.http.structure_fields import Shape, shape_of_format
from scalellm.services.tokenizer.http.tool_fields import set_tools, tool_names
from scalellm.services.tokenizer.message import Message
from scalellm.v1 import generation_pb2

_LOGPROBS = "message.output_text.logprobs"


class TextOptions(ApiRequest):
    """The form of a response's text."""

    format: Any = None
    verbosity: str | None = None


class Reasoning(ApiRequest):
    """The options of reasoning."""

    effort: str | None = None
    summary: str | None = None


class ResponsesRequest(ApiRequest):
    """A request for a response to a text or to items, with or without an earlier response before it."""

    model: str | None = None
    input: Any = None
    instructions: str | None = None
    max_output_tokens: UInt32 | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: UInt32 | None = None
    include: list[str] | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    stream: bool | None = None
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    background: bool | None = None
    on_disconnect: OnDisconnect | None = None

    refused = MappingProxyType(
        {
            "conversation": (),
            "prompt": (),
            "truncation": ("disabled",),
        }
    )
    ignored = frozenset(
        {
            *("max_tool_calls", "service_tier", "safety_identifier"),
            *("prompt_cache_key", "prompt_cache_retention", "stream_options"),
        }
    )

    @property
    def is_kept(self) -> bool:
        """True if the response shall outlive its call."""
        return bool(self.background) or self.on_disconnect == "keep"

    def check(self, *, can_keep: bool) -> None:
        """Raise StatusError if fields contradict each other, or the response shall be kept and the service cannot keep
        any.
        """
        if not self.background:
            return
        if self.store is False:
            raise StatusError.invalid(
                "store", "must not be false with background: a background response is read from the store"
            )
        if not can_keep:
            raise StatusError(
                grpc.StatusCode.FAILED_PRECONDITION,
                "background: is not possible here: the service was started without --redis-url",
                field="background",
            )

    def said(self) -> list[Message]:
        """Return the messages of the input. Raises StatusError."""
        if self.input is None:
            raise StatusError.invalid("input", "is required")
        return self._input[0]

    @cached_property
    def _input(self) -> tuple[list[Message], list[int]]:
        """Return the messages of the input, and the index of the item with which each begins."""
        if isinstance(self.input, str):
            return [Message("user", as_text(self.input, "input"))], []
        return messages_of(self.input)

    def to_generate(
        self,
        request_id: str,
        history: Sequence[Message],
        said: Sequence[Message],
        *,
        content_is_text: bool,
        tells_reasoning: bool = False,
    ) -> generation_pb2.GenerateRequest:
        """Return the request. Raises StatusError.

        Args:
            request_id: Its id.
            history: The messages before.
            said: The input.
            content_is_text: True if the texts of special tokens in messages are plain text.
            tells_reasoning: True to separate the model's reasoning from text.
        """
        request = generation_pb2.GenerateRequest(request_id=request_id)
        if self.is_kept:
            request.on_disconnect = generation_pb2.ON_DISCONNECT_KEEP
        request.chat.content_is_text = content_is_text
        # Instructions apply to this response alone, so they are not stored with the conversation.
        instructions = [Message("system", as_text(self.instructions, "instructions"))] if self.instructions else []
        request.chat.messages.extend(message.to_wire() for message in (*instructions, *history, *said))
        set_tools(request.chat, self.tools, self.tool_choice, is_parallel=self.parallel_tool_calls)
        if tells_reasoning:
            request.reasoning.SetInParent()
        if self.reasoning is not None and self.reasoning.effort is not None:
            request.reasoning.effort = as_text(self.reasoning.effort, "reasoning.effort")
        set_present(request.sampling, self, ("temperature", "top_p"))
        if self.max_output_tokens is not None:
            request.sampling.max_tokens = self.max_output_tokens
        if (shape := self.shape.wire) is not None:
            request.structured_output.CopyFrom(shape)
        if self.has_logprobs:
            request.sampling.logprobs = self.top_logprobs or 0
            request.output = generation_pb2.OUTPUT_TEXT_AND_TOKEN_IDS
        return request

    @property
    def text_format(self) -> dict[str, Any]:
        """The value of `text.format`, or its default."""
        return (self.text.format if self.text is not None else None) or {"type": "text"}

    @cached_property
    def shape(self) -> Shape:
        """The shape of the text. Raises StatusError."""
        return shape_of_format(self.text_format, "text.format")

    @property
    def has_logprobs(self) -> bool:
        """True if log-probabilities are wanted."""
        return bool(self.top_logprobs) or _LOGPROBS in (self.include or ())

    def names(self, num_before: int) -> dict[str, str]:
        """Return the client's names of our fields, given the number of messages before those of the input."""
        _, begins = self._input
        items = {f"chat.messages[{num_before + number}]": f"input[{index}]" for number, index in enumerate(begins)}
        return {
            "chat": "input",
            "chat.messages": "input",
            "sampling.max_tokens": "max_output_tokens",
            "sampling.logprobs": "top_logprobs",
            **items,
            **tool_names(self.tools),
            **self.shape.names,
        }
