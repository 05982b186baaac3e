"""Checks of texts in clients' JSON."""

from __future__ import annotations

import json

from scalellm.services.common.errors import StatusError


def as_text(value: object, param: str) -> str:
    """Check that a value is a text that can be encoded as UTF-8. Raises StatusError that names `param`."""
    if not isinstance(value, str):
        raise StatusError.invalid(param, "must be a string")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:  # \\ud800 in JSON
            raise StatusError.invalid(param, "holds half of a surrogate pair") from None
    return value


def json_text(value: object, param: str) -> str:
    """Return JSON as text. Clients send it either as a JSON value or as text. Raises StatusError."""
    if isinstance(value, str):
        return as_text(value, param)
    try:
        return as_text(json.dumps(value, ensure_ascii=False), param)
    except (RecursionError, ValueError):
        raise StatusError.invalid(param, "is nested too deeply, or holds a value that JSON does not have") from None
