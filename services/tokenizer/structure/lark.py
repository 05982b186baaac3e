"""Parts of grammars in llguidance's variant of Lark."""

import json
import re
from collections.abc import Mapping
from types import MappingProxyType

_ESCAPED = re.compile(r"\\(.)", re.DOTALL)
_ASCII_CLASSES: Mapping[str, str] = MappingProxyType(
    {"d": "[0-9]", "D": "[^0-9]", "w": "[0-9A-Za-z_]", "W": "[^0-9A-Za-z_]"}
)


def text(value: str) -> str:
    """Return the terminal of a text; empty for an empty text, for which there is no terminal."""
    return json.dumps(value) if value else ""


def ascii_classes(pattern: str) -> str:
    """Return a regular expression in which \\d and \\w are restricted to ASCII, as in JSON Schema.

    The executor would take them for characters of all scripts, which a model that samples sometimes draws.
    """
    return _ESCAPED.sub(lambda found: _ASCII_CLASSES.get(found[1], found[0]), pattern)


def regex(pattern: str) -> str:
    """Return the terminal of a regular expression, which is written between slashes on one line."""
    written = []
    is_escaped = False
    for char in ascii_classes(pattern):
        if is_escaped:
            # A backslash before a character that means nothing special, as these two, stands for the character.
            written.append({"\n": "n"}.get(char, char))
            is_escaped = False
        elif char == "\\":
            written.append(char)
            is_escaped = True
        else:
            written.append({"/": "\\/", "\n": "\\n"}.get(char, char))
    return f"/{''.join(written)}/"


def json_value(schema: str) -> str:
    """Return the expression for JSON that matches a schema, which is given as JSON text."""
    return f"%json {schema}"


def token(token_id: int) -> str:
    """Return the expression for one token of the vocabulary."""
    return f"<[{token_id}]>"


def literal(value: str, special_ids: Mapping[str, int]) -> str:
    """Return the expression for a text, in which the texts of special tokens stand for these tokens."""
    parts, plain = [], ""
    while value:
        special = max(filter(value.startswith, special_ids), key=len, default="")
        if special:
            parts += [text(plain), token(special_ids[special])]
            plain, value = "", value[len(special) :]
        else:
            plain, value = plain + value[0], value[1:]
    return " ".join(part for part in (*parts, text(plain)) if part)
