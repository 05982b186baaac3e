"""Variables that a request gives to the chat template: a JSON object, as gRPC carries it."""

from __future__ import annotations

import json

from scalellm.services.common.errors import StatusError
from scalellm.services.tokenizer.json_object import JsonObject, parse_object

_FIELD = "chat.template_kwargs"
_MAX_DEPTH = 16
"""Most levels of nested objects and lists, the outermost object included."""

_TAKEN = (
    *("messages", "tools", "documents", "add_generation_prompt", "continue_final_message"),
    "chat_template",
)
"""Reserved variables: those that the server sets, and parameters of transformers' apply_chat_template."""


def read_template_kwargs(text: str) -> JsonObject:
    """Return the variables; none for an empty text. Raises StatusError."""
    if not text:
        return {}
    kwargs = parse_object(text.encode(), _FIELD)
    for name in _TAKEN:
        if name in kwargs:
            raise StatusError.invalid(_FIELD, f"must not name {name}, which a request cannot set")
    if _is_deeper(kwargs, _MAX_DEPTH):
        raise StatusError.invalid(_FIELD, f"must be at most {_MAX_DEPTH} levels deep")
    try:
        json.dumps(kwargs, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise StatusError.invalid(_FIELD, "holds half of a surrogate pair") from None
    return kwargs


def with_effort(kwargs: JsonObject, effort: str) -> JsonObject:
    """Return the variables, with those for the reasoning effort added unless they are given.

    Args:
        kwargs: The request's variables.
        effort: See ReasoningOptions.effort; empty: not set.
    """
    if not effort:
        return kwargs
    off: JsonObject = {"enable_thinking": False, "thinking": False} if effort == "none" else {}
    return {"reasoning_effort": effort, **off, **kwargs}


def _is_deeper(value: object, levels: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    if not levels:
        return True
    return any(_is_deeper(item, levels - 1) for item in (value.values() if isinstance(value, dict) else value))
