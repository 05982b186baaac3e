"""Text that a hostile peer sends to drive, deceive or break the terminal of whoever reads it."""

from __future__ import annotations

import unicodedata
from typing import Any

HOSTILE = (
    "\x1b]0;title\x07\x1b[2J\x1b[31m[red]A\x9b31mB\u202eC\u2066D\u200fE\u061cF\u2028G\u2029H\r\x08I\x7fJ\x00K"
    "\nerror: L\ufeff\U000e0041:smile:"
)
"""A text with characters of each kind: C0, C1, DEL, directions, separators, invisible marks, markup, a forged line."""

_DIRECTIONS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


def is_harmful(character: str) -> bool:
    """Unicode's own view of a character, for comparison with what the command line removes."""
    return (
        (unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") and character not in "\n\t")
        or unicodedata.bidirectional(character) in _DIRECTIONS
        or character in "\u200e\u200f\u061c\ufeff"
        or 0xE0000 <= ord(character) < 0xE0080
    )


def harmful_in(text: str) -> list[str]:
    """The characters of a text that a terminal must not be given."""
    return [f"U+{ord(character):04X}" for character in text if is_harmful(character)]


def fill(message: Any, text: str = HOSTILE) -> Any:
    """Put `text` into every string of a protobuf message, its submessages, lists and maps, and return it."""
    for field in message.DESCRIPTOR.fields:
        target = getattr(message, field.name)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            _fill_map(target, field.message_type, text)
        elif field.type == field.TYPE_STRING:
            if field.is_repeated:
                target[:] = [text] * max(1, len(target))
            elif field.containing_oneof is None or message.HasField(field.name):
                setattr(message, field.name, text)
        elif field.type == field.TYPE_MESSAGE:
            for submessage in target if field.is_repeated else [target] if message.HasField(field.name) else []:
                fill(submessage, text)
    return message


def _fill_map(target: Any, entry: Any, text: str) -> None:
    key, value = entry.fields_by_name["key"], entry.fields_by_name["value"]
    if key.type == key.TYPE_STRING and value.type == value.TYPE_STRING:
        target[text] = text
