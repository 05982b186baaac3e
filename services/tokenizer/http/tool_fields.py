"""The APIs' fields for functions that the model may call, in three formats."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from scalellm.services.common.errors import StatusError
from scalellm.services.common.openai_tools import add_tools, fill_tool, openai_tool, shown_type
from scalellm.services.common.sent_text import as_text, json_text
from scalellm.v1 import generation_pb2

_MODES: Mapping[str, generation_pb2.ToolChoiceMode] = {
    "none": generation_pb2.TOOL_CHOICE_MODE_NONE,
    "required": generation_pb2.TOOL_CHOICE_MODE_REQUIRED,
}


def set_tools(chat: generation_pb2.Chat, tools: object, choice: object, *, is_parallel: bool | None) -> None:
    """Add OpenAI's `tools` and `tool_choice` to a conversation. Raises StatusError.

    Args:
        chat: The conversation.
        tools: In the format of chats, or flat as in responses; None: there are none.
        choice: In the format of chats, or flat as in responses; None: the model chooses.
        is_parallel: False: an answer has at most one call.
    """
    add_tools(chat, tools, openai_tool)
    if is_parallel is False and chat.tools:
        chat.tool_choice.single = True
    if choice is None:
        return
    if isinstance(choice, str):
        _set_mode(chat, choice, "tool_choice")
    elif not isinstance(choice, dict):
        raise StatusError.invalid("tool_choice", "must be a string or an object")
    elif choice.get("type") == "function":
        _choose_one(chat, _named(choice, "tool_choice"))
    elif choice.get("type") == "allowed_tools":
        allowed = choice.get("allowed_tools", choice)
        where = "tool_choice.allowed_tools" if "allowed_tools" in choice else "tool_choice"
        if not isinstance(allowed, dict) or not isinstance(allowed.get("tools"), list):
            raise StatusError.invalid(f"{where}.tools", "must be a list of tools")
        _set_mode(chat, allowed.get("mode", "auto"), f"{where}.mode")
        chat.tool_choice.names.extend(
            _named(tool, f"{where}.tools[{index}]") for index, tool in enumerate(allowed["tools"])
        )
        if not allowed["tools"]:
            raise StatusError.invalid(f"{where}.tools", "must not be empty")
    else:
        raise StatusError.invalid("tool_choice.type", f"must be function or allowed_tools, got {shown_type(choice)}")


def set_anthropic_tools(chat: generation_pb2.Chat, tools: object, choice: object) -> None:
    """Add Anthropic's `tools` and `tool_choice` to a conversation. Raises StatusError."""
    add_tools(chat, tools, _anthropic_tool)
    if choice is None:
        return
    if not isinstance(choice, dict):
        raise StatusError.invalid("tool_choice", "must be an object")
    if choice.get("disable_parallel_tool_use") and chat.tools:
        chat.tool_choice.single = True
    match choice.get("type"):
        case "auto":
            pass
        case "none":
            chat.tool_choice.mode = generation_pb2.TOOL_CHOICE_MODE_NONE
        case "any":
            chat.tool_choice.mode = generation_pb2.TOOL_CHOICE_MODE_REQUIRED
        case "tool":
            _choose_one(chat, as_text(choice.get("name"), "tool_choice.name"))
        case _:
            raise StatusError.invalid("tool_choice.type", f"must be auto, any, tool or none, got {shown_type(choice)}")


def add_calls(message: generation_pb2.ChatMessage, calls: object, param: str) -> None:
    """Add the `tool_calls` of a chat's message to it. Raises StatusError."""
    if not isinstance(calls, list):
        raise StatusError.invalid(param, "must be a list of calls")
    for index, call in enumerate(calls):
        where = f"{param}[{index}]"
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict):
            raise StatusError.invalid(f"{where}.function", "must be an object: only functions are called")
        message.tool_calls.add(
            id=as_text(call.get("id"), f"{where}.id"),
            name=as_text(function.get("name"), f"{where}.function.name"),
            arguments=json_text(function.get("arguments", ""), f"{where}.function.arguments"),
        )


def tool_names(tools: object, inner: str = "", schema: str = "parameters") -> dict[str, str]:
    """Return a client's names of our fields of tools.

    Args:
        tools: The tools as the client sent them.
        inner: Path of a tool's own fields in it: `.function` in chats, nothing elsewhere.
        schema: Name of the field with the schema of its arguments.
    """
    names = {"chat.tools": "tools", "chat.tool_choice": "tool_choice", "chat.documents": "documents"}
    for index in range(len(tools) if isinstance(tools, list) else 0):
        names[f"chat.tools[{index}]"] = f"tools[{index}]{inner}"
        if schema != "parameters":
            names[f"chat.tools[{index}].parameters"] = f"tools[{index}].{schema}"
    return names


def _anthropic_tool(tool: dict[str, Any], where: str, made: generation_pb2.Tool) -> None:
    if tool.get("type") not in (None, "custom"):
        raise StatusError.invalid(
            f"{where}.type", f"must be custom: the server does not run tools itself, got {shown_type(tool)}"
        )
    fill_tool(made, tool, "input_schema", where)


def _choose_one(chat: generation_pb2.Chat, name: str) -> None:
    choice = chat.tool_choice
    choice.mode, choice.single = generation_pb2.TOOL_CHOICE_MODE_REQUIRED, True
    choice.names.append(name)


def _named(tool: Any, where: str) -> str:
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    if not isinstance(function, dict):
        raise StatusError.invalid(where, "must be an object with the name of a function")
    return as_text(function.get("name"), f"{where}.function.name" if "function" in tool else f"{where}.name")


def _set_mode(chat: generation_pb2.Chat, value: object, where: str) -> None:
    if value == "auto":
        return
    if not isinstance(value, str) or value not in _MODES:
        raise StatusError.invalid(where, f"must be auto, {', '.join(_MODES)} or an object, got {str(value)[:64]!r}")
    chat.tool_choice.mode = _MODES[value]
