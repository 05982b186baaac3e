"""Conversion of tools from the JSON of OpenAI's API."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from scalellm.services.common.errors import StatusError
from scalellm.services.common.sent_text import as_text, json_text
from scalellm.v1 import generation_pb2


def add_tools(chat: generation_pb2.Chat, tools: object, read: Callable[[Any, str, generation_pb2.Tool], None]) -> None:
    """Add a JSON list of tools to a conversation, each converted by `read`. Raises StatusError that names the entry."""
    if tools is None:
        return
    if not isinstance(tools, list):
        raise StatusError.invalid("tools", "must be a list of tools")
    for index, tool in enumerate(tools):
        where = f"tools[{index}]"
        if not isinstance(tool, dict):
            raise StatusError.invalid(where, "must be an object")
        read(tool, where, chat.tools.add())


def openai_tool(tool: dict[str, Any], where: str, made: generation_pb2.Tool) -> None:
    """Fill in a tool from OpenAI's JSON, in the format of chats, or flat as in responses. Raises StatusError."""
    if tool.get("type") != "function":
        raise StatusError.invalid(
            f"{where}.type", f"must be function: nothing else can be called here, got {shown_type(tool)}"
        )
    function = tool.get("function", tool)
    if "function" in tool:
        where = f"{where}.function"
    if not isinstance(function, dict):
        raise StatusError.invalid(where, "must be an object")
    fill_tool(made, function, "parameters", where)


def fill_tool(made: generation_pb2.Tool, function: dict[str, Any], schema: str, where: str) -> None:
    """Fill in a tool from the fields of a function; schema: name of the field with its arguments. Raises
    StatusError.
    """
    made.name = as_text(function.get("name"), f"{where}.name")
    if function.get("description") is not None:
        made.description = as_text(function["description"], f"{where}.description")
    if function.get(schema) is not None:
        if not isinstance(function[schema], dict):
            raise StatusError.invalid(f"{where}.{schema}", "must be a JSON schema")
        made.parameters = json_text(function[schema], f"{where}.{schema}")
    if (strict := function.get("strict")) is not None:
        if not isinstance(strict, bool):
            raise StatusError.invalid(f"{where}.strict", "must be true or false")
        made.strict = strict


def shown_type(value: Mapping[str, Any]) -> str:
    """Return the field `type` of an object as messages quote it."""
    kind = value.get("type")
    return repr(kind[:64]) if isinstance(kind, str) else "none"
