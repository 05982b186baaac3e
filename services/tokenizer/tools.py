"""The functions of a request: their validation, and the forms that grammar, splitter and chat template need."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from scalellm.services.common.errors import StatusError
from scalellm.services.common.field_rules import CHAT_LISTS, MAX_STRUCTURE_BYTES
from scalellm.services.tokenizer.dialect.calls import CalledTool, Calls
from scalellm.services.tokenizer.dialect.schemas import is_text
from scalellm.services.tokenizer.json_object import parse_object
from scalellm.v1 import generation_pb2

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_NO_ARGUMENTS = '{"type": "object", "properties": {}, "additionalProperties": false}'
_MAX_CALL_ID_BYTES = 128


def validate_tools(chat: generation_pb2.Chat) -> int:
    """Check tools, calls and documents of a conversation. Returns the size of their text in bytes. Raises
    StatusError.
    """
    size = _check_tools(chat.tools) + len(chat.documents.encode())
    choice = chat.tool_choice
    if choice.mode not in generation_pb2.ToolChoiceMode.values():
        raise StatusError.invalid("chat.tool_choice.mode", f"must be a value of ToolChoiceMode, got {choice.mode}")
    if choice.mode == generation_pb2.TOOL_CHOICE_MODE_REQUIRED and not chat.tools:
        raise StatusError.invalid("chat.tool_choice", "must not require a call where there are no tools")
    names = {tool.name for tool in chat.tools}
    for index, name in enumerate(choice.names):
        if name not in names:
            raise StatusError.invalid(
                f"chat.tool_choice.names[{index}]", f"must be one of the tools, got {name[:64]!r}"
            )
    if chat.documents:
        _documents(chat.documents)
    for index, message in enumerate(chat.messages):
        size += _check_message(message, f"chat.messages[{index}]")
    return size


def _check_tools(tools: Sequence[generation_pb2.Tool]) -> int:
    if fault := CHAT_LISTS["tools"].fault(tools):
        raise StatusError.invalid("chat.tools", fault)
    size = 0
    names: set[str] = set()
    for index, tool in enumerate(tools):
        field = f"chat.tools[{index}]"
        if not _NAME.fullmatch(tool.name):
            raise StatusError.invalid(f"{field}.name", "must be 1 to 64 characters of [A-Za-z0-9._-]")
        if tool.name in names:
            raise StatusError.invalid(f"{field}.name", f"must be different for each tool, got {tool.name!r} again")
        names.add(tool.name)
        if tool.parameters:
            schema = parse_object(tool.parameters.encode(), f"{field}.parameters")
            if schema.get("type", "object") != "object":
                raise StatusError.invalid(f"{field}.parameters", "must be the schema of an object")
        size += len(tool.name) + len(tool.description.encode()) + len(tool.parameters.encode())
    return size


def _check_message(message: generation_pb2.ChatMessage, field: str) -> int:
    if message.tool_calls and message.role != "assistant":
        raise StatusError.invalid(f"{field}.tool_calls", f"must be of role assistant, got {message.role[:64]!r}")
    if fault := CHAT_LISTS["messages.tool_calls"].fault(message.tool_calls):
        raise StatusError.invalid(f"{field}.tool_calls", fault)
    size = len(message.reasoning.encode())
    for index, call in enumerate(message.tool_calls):
        where = f"{field}.tool_calls[{index}]"
        if not 1 <= len(call.id.encode()) <= _MAX_CALL_ID_BYTES:
            raise StatusError.invalid(f"{where}.id", f"must have 1 to {_MAX_CALL_ID_BYTES} bytes")
        if not call.name:
            raise StatusError.invalid(f"{where}.name", "must not be empty")
        if call.arguments:
            parse_object(call.arguments.encode(), f"{where}.arguments")
        size += len(call.id.encode()) + len(call.name.encode()) + len(call.arguments.encode())
    if message.tool_call_id and len(message.tool_call_id.encode()) > _MAX_CALL_ID_BYTES:
        raise StatusError.invalid(f"{field}.tool_call_id", f"must have at most {_MAX_CALL_ID_BYTES} bytes")
    return size + len(message.tool_call_id.encode())


def offered(chat: generation_pb2.Chat) -> Sequence[generation_pb2.Tool]:
    """Return the tools that are given to the model."""
    return () if chat.tool_choice.mode == generation_pb2.TOOL_CHOICE_MODE_NONE else chat.tools


def tools_for_template(chat: generation_pb2.Chat) -> list[dict[str, Any]]:
    """Return the variable `tools` of a chat template; empty: there are none."""
    told = []
    for tool in offered(chat):
        function: dict[str, Any] = {"name": tool.name}
        if tool.description:
            function["description"] = tool.description
        function["parameters"] = json.loads(tool.parameters or _NO_ARGUMENTS)
        told.append({"type": "function", "function": function})
    return told


def documents_for_template(chat: generation_pb2.Chat) -> list[Any] | None:
    """Return the variable `documents` of a chat template."""
    return _documents(chat.documents) if chat.documents else None


def _documents(text: str) -> list[Any]:
    parsed = parse_object(f'{{"documents": {text}}}'.encode(), "chat.documents")
    documents = parsed["documents"]
    if len(parsed) > 1 or not isinstance(documents, list):
        raise StatusError.invalid("chat.documents", "must be a JSON list")
    return documents


def calls_of(chat: generation_pb2.Chat) -> Calls | None:
    """Return the functions that an answer may call; None: none. Raises StatusError if the schemas to enforce are too
    long in total.
    """
    tools = offered(chat)
    if not tools:
        return None
    choice = chat.tool_choice
    called = [
        CalledTool(
            tool.name,
            (tool.parameters or _NO_ARGUMENTS) if tool.strict or not tool.HasField("strict") else None,
            f"chat.tools[{index}].parameters",
        )
        for index, tool in enumerate(tools)
        if not choice.names or tool.name in choice.names
    ]
    size = sum(len(tool.schema.encode()) for tool in called if tool.schema is not None)
    if size > MAX_STRUCTURE_BYTES:
        raise StatusError.invalid(
            "chat.tools",
            f"must have at most {MAX_STRUCTURE_BYTES} bytes of schemas that calls follow, got {size}; set "
            "strict to false for tools whose arguments need not",
        )
    is_required = choice.mode == generation_pb2.TOOL_CHOICE_MODE_REQUIRED
    return Calls(called, are_required=is_required, is_single=choice.single)


class ArgumentTexts:
    """Returns which arguments of a function are strings.

    Args:
        chat: The conversation with the functions.
    """

    def __init__(self, chat: generation_pb2.Chat) -> None:
        schemas = {tool.name: tool.parameters for tool in chat.tools}

        @cache
        def of(name: str) -> Mapping[str, bool]:
            schema = json.loads(schemas.get(name) or "{}")
            properties = schema.get("properties")
            return {key: is_text(value) for key, value in properties.items()} if isinstance(properties, dict) else {}

        self.of = of
