"""Conversations as JSON: messages with texts, calls of functions, and results of functions."""

from __future__ import annotations

from collections.abc import Sequence

from scalellm.services.common.errors import StatusError
from scalellm.services.common.sent_text import as_text
from scalellm.services.tokenizer.http.tool_fields import add_calls
from scalellm.v1 import generation_pb2

# Messages with other contents are refused, because ignoring these would change the conversation.
_REFUSED = ("function_call", "audio")
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
_REASONING = ("reasoning", "reasoning_content")
_ROLES = {"developer": "system"}
"""Roles that chat templates do not know, and the roles that replace them."""


def add_messages(chat: generation_pb2.Chat, value: object, param: str = "messages") -> None:
    """Add the messages of a JSON list to a conversation. Raises StatusError."""
    if not isinstance(value, list):
        raise StatusError.invalid(param, "must be a list of messages")
    for index, item in enumerate(value):
        where = f"{param}[{index}]"
        if not isinstance(item, dict):
            raise StatusError.invalid(where, "must be an object")
        for name in _REFUSED:
            if item.get(name):
                raise StatusError.invalid(f"{where}.{name}", "is not supported here")
        role = as_text(item.get("role"), f"{where}.role")
        content = text_of(item.get("content"), f"{where}.content")
        message = chat.messages.add(role=_ROLES.get(role, role), content=content)
        if item.get("tool_calls"):
            add_calls(message, item["tool_calls"], f"{where}.tool_calls")
        if item.get("tool_call_id"):
            message.tool_call_id = as_text(item["tool_call_id"], f"{where}.tool_call_id")
        for name in _REASONING:
            if item.get(name):
                message.reasoning = as_text(item[name], f"{where}.{name}")


def text_of(content: object, param: str) -> str:
    """Return the text of a message: a string, or a list of parts that are texts. Raises StatusError."""
    if isinstance(content, str):
        return as_text(content, param)
    if content is None:
        return ""
    if not isinstance(content, list):
        raise StatusError.invalid(param, "must be a string or a list of parts")
    return "\n".join(text_of_part(part, f"{param}[{index}]") for index, part in enumerate(content))


def text_of_part(part: object, param: str) -> str:
    """Return the text of a part of a message. Raises StatusError."""
    if isinstance(part, str):
        return as_text(part, param)
    if not isinstance(part, dict):
        raise StatusError.invalid(param, "must be an object")
    kind = part.get("type")
    if not isinstance(kind, str) or kind not in _TEXT_PARTS:
        shown = repr(kind[:64]) if isinstance(kind, str) else "none"
        raise StatusError.invalid(f"{param}.type", f"must be text: the model reads nothing else, got {shown}")
    name = _TEXT_PARTS[kind]
    return as_text(part.get(name), f"{param}.{name}")


def last_role(chat: generation_pb2.Chat) -> str:
    """The role of the last message; empty where there is none."""
    messages: Sequence[generation_pb2.ChatMessage] = chat.messages
    return messages[-1].role if messages else ""
