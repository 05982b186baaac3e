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
        tools: One of these each time.
        are_required: It has a call, and no text.
        is_single: It has no more than one.
    """

    tools: Sequence[CalledTool]
    are_required: bool = False
    is_single: bool = False
