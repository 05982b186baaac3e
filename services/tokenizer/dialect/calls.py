"""The functions that an answer may call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scalellm.services.common.field_rules import CHAT_LISTS

MAX_CALLS = CHAT_LISTS["messages.tool_calls"].most
"""Calls in one answer."""


@dataclass(frozen=True, slots=True)
class CalledTool:
    """A function that an answer may call.

    Attributes:
        name: Its name.
        schema: JSON Schema of its arguments, as JSON; None: any JSON object.
        field: The schema's field in the request.
    """

    name: str
    schema: str | None
    field: str


@dataclass(frozen=True, slots=True)
class Calls:
    """The functions that an answer may call.

    Attributes:
        tools: The functions.
        are_required: True if the answer must consist of calls, without text.
        is_single: True if the answer may have at most one call.
    """

    tools: Sequence[CalledTool]
    are_required: bool = False
    is_single: bool = False
