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
    """Return what stands for a text: nothing for an empty one, as there is no terminal for it."""
    return json.dumps(value) if value else ""


def ascii_classes(pattern: str) -> str:
    """Return a regular expression in which \\d and \\w mean what they do in JSON Schema: characters of ASCII.

    To the executor they are those of all scripts, and a model that draws at random finds them.
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
    """Return what stands for JSON that a schema, which is JSON text, describes."""
    return f"%json {schema}"


def token(token_id: int) -> str:
    """Return what stands for one token of the vocabulary."""
    return f"<[{token_id}]>"


def literal(value: str, special_ids: Mapping[str, int]) -> str:
    """Return what stands for a text in which special tokens, given by their texts, are these tokens."""
    parts, plain = [], ""
    while value:
        special = max(filter(value.startswith, special_ids), key=len, default="")
        if special:
            parts += [text(plain), token(special_ids[special])]
            plain, value = "", value[len(special) :]
        else:
            plain, value = plain + value[0], value[1:]
    return " ".join(part for part in (*parts, text(plain)) if part)
