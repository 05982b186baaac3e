"""Strict parsing of JSON objects from clients, with StatusErrors that name the fault."""

from __future__ import annotations

import json
from functools import partial
from typing import NoReturn

from scalellm.services.common.errors import StatusError

JsonObject = dict[str, object]

_MAX_OBJECTS = 16_384
"""Most objects in a text, because for each one a function is called that detects duplicate keys."""


def parse_object(data: bytes, field: str = "body") -> JsonObject:
    """Parse a JSON object in UTF-8. Raises StatusError that names `field` for anything else.

    NaN, Infinity, duplicate keys and texts that are not valid Unicode are refused, because readers of such a text
    disagree on its meaning.
    """
    count = 0
    invalid = partial(StatusError.invalid, field)

    def to_object(pairs: list[tuple[str, object]]) -> JsonObject:
        nonlocal count
        count += 1
        if count > _MAX_OBJECTS:
            raise _RefusedError(f"holds more than {_MAX_OBJECTS} objects")
        made = dict(pairs)
        if len(made) < len(pairs):
            seen: set[str] = set()
            for name, _ in pairs:
                if name in seen:
                    raise _RefusedError(f"has the key {name[:64]!r} twice in one object")
                seen.add(name)
        return made

    try:
        value = json.loads(data.decode(), object_pairs_hook=to_object, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise invalid(f"is not UTF-8 at byte {error.start}") from None
    except _RefusedError as error:
        raise invalid(str(error)) from None
    except RecursionError:
        raise invalid("is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise invalid(f"is not JSON: {error.msg} at character {error.pos}") from None
    except ValueError:  # of int(): thousands of digits
        raise invalid("holds a number with too many digits") from None
    if not isinstance(value, dict):
        raise invalid("must be a JSON object")
    return value


class _RefusedError(Exception):
    """The text is not an object that is accepted; the message says why."""


def _refuse_constant(name: str) -> NoReturn:
    raise _RefusedError(f"holds {name}, which is not JSON")
