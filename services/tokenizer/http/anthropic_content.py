"""Messages of Anthropic's API: blocks of text, thinking, calls of tools and results of tools."""

from __future__ import annotations

import json
from typing import Any

from scalellm.services.common.errors import StatusError
from scalellm.services.common.sent_text import as_text, json_text
from scalellm.services.tokenizer.http.messages import text_of, text_of_part
from scalellm.v1 import generation_pb2

_ROLES = ("user", "assistant")
_OF_ASSISTANT = ("thinking", "redacted_thinking", "tool_use")


def add_anthropic_messages(chat: generation_pb2.Chat, value: object) -> dict[str, str]:
    """Add the messages of a JSON list to a conversation. Raises StatusError.

    Results of tools become messages of their own, before the text of the same message.

    Returns:
        The client's names of our fields of the messages; see `param_of`.
    """
    if not isinstance(value, list):
        raise StatusError.invalid("messages", "must be a list of messages")
    names: dict[str, str] = {}
    for index, item in enumerate(value):
        where, first = f"messages[{index}]", len(chat.messages)
        if not isinstance(item, dict):
            raise StatusError.invalid(where, "must be an object")
        role = as_text(item.get("role"), f"{where}.role")
        if role not in _ROLES:
            raise StatusError.invalid(f"{where}.role", f"must be one of {', '.join(_ROLES)}")
        content = item.get("content")
        if isinstance(content, list):
            _add_blocks(chat, role, content, f"{where}.content")
        else:
            chat.messages.add(role=role, content=text_of(content, f"{where}.content"))
        names |= {f"chat.messages[{number}]": where for number in range(first, len(chat.messages))}
    return names


def _add_blocks(chat: generation_pb2.Chat, role: str, blocks: list[Any], param: str) -> None:
    message = generation_pb2.ChatMessage(role=role)
    texts = []
    for index, block in enumerate(blocks):
        where = f"{param}[{index}]"
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "tool_result" and role == "user":
            result = text_of(block.get("content"), f"{where}.content")
            call_id = as_text(block.get("tool_use_id"), f"{where}.tool_use_id")
            if not call_id:
                raise StatusError.invalid(f"{where}.tool_use_id", "must not be empty")
            chat.messages.add(role="tool", content=result, tool_call_id=call_id)
        elif kind in _OF_ASSISTANT and role == "assistant":
            _add_of_assistant(message, block, where)
        else:
            texts.append(text_of_part(block, where))
    message.content = "\n".join(texts)
    if texts or not blocks or role == "assistant":
        chat.messages.append(message)


def _add_of_assistant(message: generation_pb2.ChatMessage, block: dict[str, Any], where: str) -> None:
    match block["type"]:
        case "thinking":
            message.reasoning += as_text(block.get("thinking", ""), f"{where}.thinking")
        case "tool_use":
            message.tool_calls.add(
                id=as_text(block.get("id"), f"{where}.id"),
                name=as_text(block.get("name"), f"{where}.name"),
                arguments=json_text(block.get("input") or {}, f"{where}.input"),
            )


def input_of(arguments: str) -> dict[str, Any] | None:
    """Return the arguments of a call as an object; None if the call was cut off."""
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
