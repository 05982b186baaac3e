"""Functions that an answer may call, as options name them."""

from __future__ import annotations

import json
from pathlib import Path

from scalellm.cli.context import CliError, ExitCode
from scalellm.services.common.errors import StatusError
from scalellm.services.common.field_rules import CHAT_LISTS
from scalellm.services.common.openai_tools import add_tools, openai_tool
from scalellm.v1.generation_pb2 import TOOL_CHOICE_MODE_NONE, TOOL_CHOICE_MODE_REQUIRED, Chat

TOOLS_HELP = f"Functions that the model may call, as OpenAI's API has them: a JSON list, {CHAT_LISTS['tools'].limits}."
CHOICE_HELP = "auto: as the model likes, required: a call, none: no call, or the name of the function to call."


def offer_tools(chat: Chat, file: Path | None, choice: str | None) -> None:
    """Offer the functions of a file in a conversation. Raises CliError.

    Args:
        chat: The conversation.
        file: A JSON list of them; None: there are none.
        choice: Calls of the model, as CHOICE_HELP says; None: as it likes.
    """
    if file is None:
        if choice is not None:
            raise CliError("--tool-choice needs --tools", ExitCode.USAGE)
        return
    try:
        add_tools(chat, json.loads(file.read_text(encoding="utf-8")), openai_tool)
    except OSError as error:
        raise CliError(f"--tools: {file} cannot be read: {error.strerror}", ExitCode.USAGE) from None
    except (ValueError, RecursionError) as error:  # also where it is not UTF-8
        raise CliError(f"--tools: {file} is not JSON: {error}", ExitCode.USAGE) from None
    except StatusError as error:
        raise CliError(f"--tools: {file}: {error.message}", ExitCode.USAGE) from None
    if not chat.tools:
        raise CliError(f"--tools: {file} has no tools", ExitCode.USAGE)
    if fault := CHAT_LISTS["tools"].fault(chat.tools):
        raise CliError(f"--tools: {file} {fault}", ExitCode.USAGE)
    _choose(chat, choice)


def _choose(chat: Chat, choice: str | None) -> None:
    if choice in (None, "auto"):
        return
    if choice == "none":
        chat.tool_choice.mode = TOOL_CHOICE_MODE_NONE
        return
    chat.tool_choice.mode = TOOL_CHOICE_MODE_REQUIRED
    if choice != "required":
        names = [tool.name for tool in chat.tools]
        if choice not in names:
            offered = ", ".join(names)
            raise CliError(f"--tool-choice: {choice!r} is not auto, required, none or one of {offered}", ExitCode.USAGE)
        chat.tool_choice.names.append(choice)
        chat.tool_choice.single = True
