"""Page tokens, which encode where the next page begins. Opaque to clients."""

from __future__ import annotations

import base64
import binascii
import json
from typing import Any

from scalellm.services.common.errors import StatusError


def make_page_token(*place: float | str) -> str:
    """Return the token of a place, which consists of numbers and texts."""
    return base64.urlsafe_b64encode(json.dumps(place).encode()).decode()


def read_page_token(token: str) -> list[Any]:
    """Return the place of a token, two values of any type. Raises StatusError INVALID_ARGUMENT."""
    try:
        place = json.loads(base64.b64decode(token, altchars=b"-_", validate=True))
        if isinstance(place, list) and len(place) == 2:
            return place
    except (binascii.Error, ValueError, RecursionError):
        pass
    raise bad_page_token()


def bad_page_token() -> StatusError:
    """Return the error for a page token that is not from an answer."""
    return StatusError.invalid("page_token", "must be empty or the next_page_token of an earlier answer")
