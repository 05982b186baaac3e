"""Validation of clients' JSON Schemas. A keyword that the executor would ignore is refused by its name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NoReturn

from scalellm.services.common.errors import StatusError
from scalellm.services.common.field_rules import MAX_SCHEMA_DEPTH
from scalellm.services.tokenizer.structure.lark import ascii_classes

FORMATS = frozenset(
    {"date-time", "date", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"}
)  # fmt: skip
"""Formats of strings that are enforced."""

_ONE_SCHEMA = frozenset({"additionalItems", "additionalProperties", "items"})
_SCHEMA_LISTS = frozenset({"allOf", "anyOf", "oneOf", "prefixItems", "items"})
_SCHEMA_MAPS = frozenset({"properties", "patternProperties", "$defs", "definitions"})
_RULES = frozenset(
    {
        *("type", "enum", "const", "$ref", "format", "pattern", "minLength", "maxLength", "minItems", "maxItems"),
        *("required", "minProperties", "maxProperties", "multipleOf"),
        *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    }
)
_ANNOTATIONS = frozenset(
    {
        *("$anchor", "$comment", "$id", "$schema", "id", "title", "description", "default", "example", "examples"),
        *("deprecated", "readOnly", "writeOnly", "contentEncoding", "contentMediaType", "contentSchema"),
        *("discriminator", "externalDocs", "xml"),
    }
)
"""Keywords that constrain nothing."""

_COUNTS = frozenset({"minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"})
"""Keywords whose values are counts."""

_KNOWN_DRAFTS = re.compile(r"https?://json-schema\.org/(draft/(2020-12|2019-09)|draft-0[3467])/schema#?")

_LEAP_YEAR = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)"
_DATE = (
    "(?:[0-9]{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    f"|02-(?:0[1-9]|1[0-9]|2[0-8]))|{_LEAP_YEAR}-02-29)"
)
_HOUR = "(?:[01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = rf"{_HOUR}:[0-5][0-9](?:\.[0-9]+)?(?:[Zz]|[+-]{_HOUR})"
_PATTERNS: Mapping[str, str] = MappingProxyType(
    {"date": f"^{_DATE}$", "time": f"^{_TIME}$", "date-time": f"^{_DATE}[Tt]{_TIME}$"}
)
"""Stricter patterns for formats of which the executor allows too much: February 29 in any year, and leap seconds."""

_CONTROL = re.compile(r"(?<!\\)(?:\\\\)*\\u00[01]")
"""In JSON text: a character that JSON writes as \\u and a number, which answers do not have (see `_OPTIONS`)."""

_OPTIONS: Mapping[str, object] = MappingProxyType(
    {
        # White space is bounded, because an unsure model tends to write spaces until max_tokens.
        "whitespace_pattern": r"[ \n\r\t]{1,32}",
        # Without \u: halves of surrogate pairs are no text, and pairs would count as two characters.
        "json_allowed_escapes": 'nrbtf\\"',
    }
)
"""Options of llguidance for writing JSON."""


def checked_schema(text: str, field: str) -> str:
    """Return a schema for the executor. Raises StatusError, which names `field`, for unsupported keywords or values.

    Args:
        text: A JSON Schema, as JSON text. Its size was checked.
        field: Its field in the request.
    """
    schema = _parsed(text, field)
    _check_depth(schema, field)
    for path, part in _schemas(schema, "#"):
        if not isinstance(part, dict):
            if not isinstance(part, bool):
                _refuse(field, f"must have an object, true or false at {path}, got {_shown(part)}")
            continue
        for keyword in _COUNTS & part.keys():
            if isinstance(count := part[keyword], float) and count.is_integer():
                part[keyword] = int(count)
        for keyword, value in part.items():
            _check_keyword(keyword, value, part, path, field)
        if isinstance(pattern := part.get("pattern"), str):
            part["pattern"] = ascii_classes(pattern)
        elif "pattern" not in part and part.get("format") in _PATTERNS:
            part["pattern"] = _PATTERNS[part.pop("format")]
        if isinstance(patterns := part.get("patternProperties"), dict):
            part["patternProperties"] = {ascii_classes(pattern): inner for pattern, inner in patterns.items()}
    if isinstance(schema, dict):
        schema = {"x-guidance": dict(_OPTIONS), **schema}
    try:
        return json.dumps(schema, allow_nan=False)
    except ValueError:  # not a reference cycle, since the schema was parsed from text
        _refuse(field, "holds a number that is too large")


def _parsed(text: str, field: str) -> Any:
    try:
        return json.loads(text, parse_constant=lambda name: _refuse(field, f"holds {name}, which is not JSON"))
    except json.JSONDecodeError as error:
        _refuse(field, f"is not JSON: {error.msg} at character {error.pos}")
    except RecursionError:
        _refuse(field, f"must be at most {MAX_SCHEMA_DEPTH} levels deep")
    except ValueError:  # of int(): thousands of digits
        _refuse(field, "holds a number with too many digits")


def _check_depth(schema: Any, field: str) -> None:
    level, depth = [schema], 0
    while level := [
        inner
        for value in level
        if isinstance(value, dict | list)
        for inner in (value.values() if isinstance(value, dict) else value)
    ]:
        depth += 1
        if depth > MAX_SCHEMA_DEPTH:
            _refuse(field, f"must be at most {MAX_SCHEMA_DEPTH} levels deep")


def _schemas(schema: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield a schema and all schemas in it, each with its JSON pointer."""
    waiting = [(path, schema)]
    while waiting:
        path, part = waiting.pop()
        yield path, part
        if not isinstance(part, dict):
            continue
        for keyword, value in part.items():
            inner: list[tuple[str, Any]] = []
            if keyword in _SCHEMA_MAPS and isinstance(value, dict):
                inner = list(value.items())
            elif keyword in _SCHEMA_LISTS and isinstance(value, list):
                inner = [(str(index), item) for index, item in enumerate(value)]
            elif keyword in _ONE_SCHEMA:
                waiting.append((f"{path}/{keyword}", value))
            waiting.extend((f"{path}/{keyword}/{name}", item) for name, item in inner)


def _check_keyword(keyword: str, value: Any, schema: Mapping[str, Any], path: str, field: str) -> None:
    known = _ONE_SCHEMA | _SCHEMA_LISTS | _SCHEMA_MAPS | _RULES | _ANNOTATIONS
    if keyword not in known and (not keyword.startswith("x-") or keyword == "x-guidance"):
        _refuse(field, f"has the keyword {_shown(keyword)} at {_shown_path(path)}, which is not supported")
    if keyword == "format" and not (isinstance(value, str) and value in FORMATS):
        supported = ", ".join(sorted(FORMATS))
        _refuse(field, f"has the format {_shown(value)} at {_shown_path(path)}; supported are {supported}")
    if keyword == "$schema" and not (isinstance(value, str) and _KNOWN_DRAFTS.fullmatch(value)):
        _refuse(field, f"has the $schema {_shown(value)} at {_shown_path(path)}, which is none of json-schema.org's")
    if keyword in ("const", "enum", "properties"):
        written = list(value) if keyword == "properties" and isinstance(value, dict) else value
        if _CONTROL.search(json.dumps(written, ensure_ascii=False)):
            _refuse(field, f"has a control character in {keyword} at {_shown_path(path)}, which is not supported")
    if keyword == "$ref" and not (isinstance(value, str) and value.startswith("#")):
        _refuse(field, f"has a $ref at {_shown_path(path)} that does not begin with '#': nothing is fetched")
    if keyword in ("minProperties", "maxProperties") and isinstance(value, int):
        required = schema.get("required")
        required = required if isinstance(required, list) else []
        named = schema.get("properties")
        optional = [name for name in named if name not in required] if isinstance(named, dict) else []
        if optional and (value or keyword == "maxProperties"):
            _refuse(
                field,
                f"has {keyword} at {_shown_path(path)}, which is supported only where all of `properties` are "
                f"required, beside the optional property {_shown(optional[0])}",
            )
        enforced = max(1, len(required))
        if keyword == "minProperties" and value > enforced:  # the grammar cannot exclude that a name occurs twice
            _refuse(
                field,
                f"has minProperties {_shown(value)} at {_shown_path(path)}; supported are 1 and the number of required "
                f"properties, here at most {enforced}",
            )


def _refuse(field: str, what: str) -> NoReturn:
    raise StatusError.invalid(field, what)


def _shown(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 64 else f"{shown[:64]}..."


def _shown_path(path: str) -> str:
    return path if len(path) <= 256 else f"{path[:256]}..."
