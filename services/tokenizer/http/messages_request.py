"""Requests of Anthropic's /v1/messages."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

from scalellm.v1 import generation_pb2
from services.common.errors import StatusError
from services.tokenizer.http.api_request import ApiRequest, UInt32, as_text, set_present
from services.tokenizer.http.messages import add_messages, last_role, text_of

_ROLES = ("user", "assistant")


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

    refused = MappingProxyType(
        {
            "tools": ([],),
            "tool_choice": ({"type": "auto"}, {"type": "none"}),
            "thinking": ({"type": "disabled"},),
            "mcp_servers": ([],),
            "container": (),
            "output_format": (),
        }
    )
    ignored = frozenset({"metadata", "service_tier", "context_management", "cache_control", "inference_geo"})

    def chat(self, *, content_is_text: bool) -> generation_pb2.Chat:
        """Return the conversation. Raises StatusError."""
        chat = generation_pb2.Chat(content_is_text=content_is_text)
        if self.system is not None and (system := text_of(self.system, "system")):
            chat.messages.add(role="system", content=system)
        first = len(chat.messages)
        add_messages(chat, self.messages)
        for index, message in enumerate(chat.messages[first:]):
            if message.role not in _ROLES:
                raise StatusError.invalid(f"messages[{index}].role", f"must be one of {', '.join(_ROLES)}")
        if last_role(chat) == "assistant":
            chat.continue_final_message = True  # it is the beginning of the answer
        return chat

    def to_generate(self, request_id: str, *, content_is_text: bool) -> generation_pb2.GenerateRequest:
        """Return the request. Raises StatusError."""
        if self.max_tokens is None:
            raise StatusError.invalid("max_tokens", "is required")
        request = generation_pb2.GenerateRequest(request_id=request_id, chat=self.chat(content_is_text=content_is_text))
        set_present(request.sampling, self, ("max_tokens", "temperature", "top_k", "top_p"))
        for index, stop in enumerate(self.stop_sequences or ()):
            request.stop.append(as_text(stop, f"stop_sequences[{index}]"))
        return request

    @property
    def names(self) -> dict[str, str]:
        """What our fields are called here."""
        names = {"stop": "stop_sequences"}
        if self.system:
            count = len(self.messages) if isinstance(self.messages, list) else 0
            names["chat.messages[0]"] = "system"
            names |= {f"chat.messages[{index + 1}]": f"messages[{index}]" for index in range(count)}
        return names
