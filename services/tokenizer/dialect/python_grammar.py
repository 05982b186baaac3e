"""The grammar of arguments of calls that are written as Python does: `key=value, key=value`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from scalellm.services.common.errors import StatusError
from scalellm.services.tokenizer.dialect.calls import CalledTool
from scalellm.services.tokenizer.dialect.schemas import definitions_of, is_text, properties_of
from scalellm.services.tokenizer.structure import lark
from scalellm.services.tokenizer.structure.json_schema import checked_schema


def _json(schema: Any, field: str = "") -> str:
    """Return the expression for JSON that matches a schema."""
    return lark.json_value(checked_schema(json.dumps(schema), field))


_PLAIN = frozenset({"type", "title", "description", "default", "examples"})
"""Keywords of a string's schema that allow any text."""

_SINGLE = r"""SINGLE: /'([^'\\\x00-\x1f]|\\['"\\\/nrbtf])*'/"""
_ANY = (
    f'python: {_json({"type": ["string", "number"]})} | SINGLE | "True" | "False" | "None" | list | dict',
    'list: "[" (python (", " python)*)? "]"',
    'dict: "{" (entry (", " entry)*)? "}"',
    f'entry: ({_json({"type": "string"})} | SINGLE) ": " python',
    "KEY: /[A-Za-z_][A-Za-z0-9_]{0,63}/",
)


def python_arguments(tool: CalledTool, place: str, rules: list[str]) -> str:
    """Return the expression for the arguments of a call, in the order of the schema. Raises StatusError.

    Args:
        tool: The function.
        place: Suffix of the names of rules.
        rules: Receives the rules that the expression needs.
    """
    if _SINGLE not in rules:
        rules.append(_SINGLE)
    if tool.schema is None:
        rules.extend(rule for rule in _ANY if rule not in rules)
        return '(KEY "=" python (", " KEY "=" python)*)?'
    checked_schema(tool.schema, tool.field)
    schema = json.loads(tool.schema)
    properties, required = properties_of(schema, tool.field)
    for key in properties:
        if not key.isidentifier():
            raise StatusError.invalid(
                tool.field,
                f"has the property {key[:64]!r}, which is not a name in Python: this model writes calls as Python",
            )
    arguments = [f"{lark.text(f'{key}=')} {_value(value, schema, tool)}" for key, value in properties.items()]
    are_required = [key in required for key in properties]
    return _list(arguments, are_required, place, rules)


def _list(arguments: Sequence[str], are_required: Sequence[bool], place: str, rules: list[str]) -> str:
    """Return the expression for arguments with commas between them, of which optional ones may be left out."""
    count = len(arguments)
    for index, (argument, is_required) in enumerate(zip(arguments, are_required, strict=True)):
        rules.append(f"argument_{place}_{index}: {argument}")
        following = f'(", " argument_{place}_{index})'
        following = following if is_required else f"{following}?"
        rules.append(f"rest_{place}_{index}: {following} rest_{place}_{index + 1}")
        first = f"argument_{place}_{index} rest_{place}_{index + 1}"
        other = "" if is_required else f" | first_{place}_{index + 1}"
        rules.append(f"first_{place}_{index}: {first}{other}")
    rules.append(f'rest_{place}_{count}: ""')
    rules.append(f'first_{place}_{count}: ""')
    return f"first_{place}_0"


def _value(value: Any, schema: Mapping[str, Any], tool: CalledTool) -> str:
    """Return the expression for one value: JSON, or also a Python literal if the schema decides the type."""
    if is_text(value):
        choices = [value["const"]] if "const" in value else value.get("enum")
        if choices is not None and value.keys() <= _PLAIN | {"const", "enum"}:
            spelled = [spelling for choice in choices for spelling in (json.dumps(choice), _single(choice))]
            return f"({' | '.join(map(lark.text, spelled))})"
    whole = value if isinstance(value, bool) else {**definitions_of(schema), **value}
    written = [_json(whole, tool.field)]
    if isinstance(value, dict) and value.keys() <= _PLAIN:
        types = value.get("type", [])
        for kind in [types] if isinstance(types, str) else types:
            written += {"boolean": ['"True"', '"False"'], "null": ['"None"'], "string": ["SINGLE"]}.get(kind, [])
    return f"({' | '.join(written)})"


def _single(text: str) -> str:
    """Return a string as a Python literal in single quotes."""
    inner = json.dumps(text, ensure_ascii=False)[1:-1].replace('\\"', '"').replace("'", "\\'")
    return f"'{inner}'"
