"""Requests of Anthropic's /v1/messages."""

from __future__ import annotations

from functools import cached_property
from types import MappingProxyType
from typing import Any

from scalellm.services.common.errors import StatusError
from scalellm.services.common.sent_text import as_text
from scalellm.services.tokenizer.http.anthropic_content import add_anthropic_messages
from scalellm.services.tokenizer.http.api_request import ApiRequest, UInt32, set_present
from scalellm.services.tokenizer.http.messages import last_role, text_of
from scalellm.services.tokenizer.http.tool_fields import set_anthropic_tools, tool_names
from scalellm.v1 import generation_pb2


class MessagesRequest(ApiRequest):
    """A conversation to go on with."""

    model: str | None = None
    messages: Any = None
    system: Any = None
    max_tokens: UInt32 | None = None
    temperature: float | None = None
    top_k: UInt32 | None = None
    top_p: float | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None

    tools: Any = None
    tool_choice: Any = None
    thinking: dict[str, Any] | None = None

    refused = MappingProxyType({"mcp_servers": ([],), "container": (), "output_format": ()})
    ignored = frozenset({"metadata", "service_tier", "context_management", "cache_control", "inference_geo"})

    def chat(self, *, content_is_text: bool) -> generation_pb2.Chat:
        """Return the conversation. Raises StatusError."""
        chat, _ = self._conversation
        chat.content_is_text = content_is_text
        return chat

    @cached_property
    def _conversation(self) -> tuple[generation_pb2.Chat, dict[str, str]]:
        """Return the conversation, and the client's names of our fields of its messages."""
        chat, names = generation_pb2.Chat(), {}
        if self.system is not None and (system := text_of(self.system, "system")):
            chat.messages.add(role="system", content=system)
            names["chat.messages[0]"] = "system"
        names |= add_anthropic_messages(chat, self.messages)
        if last_role(chat) == "assistant":
            chat.continue_final_message = True  # it is the beginning of the answer
        set_anthropic_tools(chat, self.tools, self.tool_choice)
        return chat, names

    def to_generate(
        self, request_id: str, *, content_is_text: bool, tells_reasoning: bool = False
    ) -> generation_pb2.GenerateRequest:
        """Return the request. Raises StatusError.

        Args:
            request_id: Its id.
            content_is_text: True if the texts of special tokens in messages are plain text.
            tells_reasoning: True to separate the model's reasoning from text.
        """
        if self.max_tokens is None:
            raise StatusError.invalid("max_tokens", "is required")
        request = generation_pb2.GenerateRequest(request_id=request_id, chat=self.chat(content_is_text=content_is_text))
        set_present(request.sampling, self, ("max_tokens", "temperature", "top_k", "top_p"))
        for index, stop in enumerate(self.stop_sequences or ()):
            request.stop.append(as_text(stop, f"stop_sequences[{index}]"))
        if tells_reasoning:
            request.reasoning.include = False  # unless it is asked for
        if self.thinking is not None:
            self._set_thinking(request, self.thinking)
        return request

    def _set_thinking(self, request: generation_pb2.GenerateRequest, thinking: dict[str, Any]) -> None:
        match thinking.get("type"):
            case "disabled":
                request.reasoning.effort = "none"
            case "enabled" | "adaptive":
                request.reasoning.include = True
                budget = thinking.get("budget_tokens")
                if budget is not None:
                    if type(budget) is not int or not 0 <= budget < 2**32:
                        raise StatusError.invalid("thinking.budget_tokens", "must be a number of tokens")
                    request.reasoning.budget_tokens = budget
            case _:
                raise StatusError.invalid("thinking.type", "must be enabled, adaptive or disabled")

    @property
    def names(self) -> dict[str, str]:
        """The client's names of our fields."""
        _, names = self._conversation
        return {
            "stop": "stop_sequences",
            "reasoning.budget_tokens": "thinking.budget_tokens",
            "reasoning.effort": "thinking",
            **names,
            **tool_names(self.tools, schema="input_schema"),
        }
