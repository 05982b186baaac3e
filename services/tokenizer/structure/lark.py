"""Parts of grammars in llguidance's variant of Lark."""

import json


def text(value: str) -> str:
    """Return what stands for a text: nothing for an empty one, as there is no terminal for it."""
    return json.dumps(value) if value else ""


def regex(pattern: str) -> str:
    """Return the terminal of a regular expression, which is written between slashes on one line."""
    written = []
    is_escaped = False
    for char in pattern:
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
