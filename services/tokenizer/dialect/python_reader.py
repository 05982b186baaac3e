"""Reads the arguments of calls that are written as Python does: `key=value, key=value`."""

from __future__ import annotations

import json
import re

_OF_NOTE = re.compile(r"""["'\\,(){}\[\]]""")
_LITERAL = re.compile(r"""'(?P<single>(?:[^'\\]|\\.)*)'|"(?:[^"\\]|\\.)*"|\b(?P<word>True|False|None)\b""", re.DOTALL)
_ESCAPE_OR_QUOTE = re.compile(r"""\\.|\"""", re.DOTALL)
_WORDS = {"True": "true", "False": "false", "None": "null"}


class PythonReader:
    """Reads arguments up to the end of the call incrementally, and returns them as one JSON object, each once it is
    complete.

    Args:
        after: Text that ends the call, one closing bracket.

    Attributes:
        is_complete: True once all arguments were read.
    """

    def __init__(self, after: str) -> None:
        self._after = after
        self._place = 0
        """Number of scanned characters of the incomplete argument."""
        self._depth = 0
        self._quote = ""
        self._is_first = True
        self.is_complete = False

    def read(self, text: str) -> tuple[str, str]:
        """Return the new text of the arguments, and the rest: text after them, or text to read again once more has
        come.
        """
        told: list[str] = []
        while (found := _OF_NOTE.search(text, self._place)) is not None:
            char, self._place = found[0], found.end()
            if char == "\\":
                if self._place == len(text):  # the escaped character has not come yet
                    self._place -= 1
                    break
                self._place += 1
            elif self._quote:
                self._quote = "" if char == self._quote else self._quote
            elif char in "\"'":
                self._quote = char
            elif not self._depth and char in (",", self._after):
                self._argument(told, text[: found.start()])
                self.is_complete = char == self._after
                text = text[found.start() :] if self.is_complete else text[found.end() :]
                self._place = 0
                if self.is_complete:
                    told.append("{}" if self._is_first else "}")
                    return "".join(told), text
            elif char != ",":
                self._depth += 1 if char in "([{" else -1
        else:
            self._place = len(text)
        return "".join(told), text

    def _argument(self, told: list[str], text: str) -> None:
        key, has_value, value = text.partition("=")
        if not has_value:
            return
        told.append(f"{'{' if self._is_first else ', '}{json.dumps(key.strip(), ensure_ascii=False)}: ")
        told.append(as_json(value.strip()))
        self._is_first = False


def as_json(value: str) -> str:
    """Convert a literal of Python or JSON to JSON. Any other text becomes a string."""
    written = _LITERAL.sub(_literal, value)
    try:
        json.loads(written, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return json.dumps(value, ensure_ascii=False)
    return written


def _literal(found: re.Match[str]) -> str:
    if (word := found["word"]) is not None:
        return _WORDS[word]
    if (single := found["single"]) is None:
        return found[0]
    return f'"{_ESCAPE_OR_QUOTE.sub(_in_double_quotes, single)}"'


def _in_double_quotes(found: re.Match[str]) -> str:
    return {"\\'": "'", '"': '\\"'}.get(found[0], found[0])


def _refuse(name: str) -> None:
    raise ValueError(name)
