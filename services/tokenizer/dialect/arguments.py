"""Incremental readers of the arguments of calls."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import NoReturn

from scalellm.services.tokenizer.dialect.dialect import TaggedArguments

_OF_NOTE = re.compile(r'["\\{}\[\]]')


def _refuse(name: str) -> NoReturn:
    raise ValueError(name)


class JsonReader:
    """Reads one JSON object incrementally, and passes its text on unchanged.

    Attributes:
        is_complete: True once the whole object was read.
    """

    def __init__(self) -> None:
        self._depth = 0
        self._is_string = False
        self._is_escaped = False
        self.is_complete = False

    def read(self, text: str) -> tuple[str, str]:
        """Return the new text of the arguments, and the rest: text after them, or text to read again once more has
        come.
        """
        if not self._depth:
            text = text.lstrip()
        if self._is_escaped and text:
            self._is_escaped = False
            place = 1
        else:
            place = 0
        while (found := _OF_NOTE.search(text, place)) is not None:
            place = found.end()
            char = found[0]
            if char == "\\":
                if place == len(text):
                    self._is_escaped = True
                place += 1
            elif char == '"':
                self._is_string = not self._is_string
            elif not self._is_string:
                self._depth += 1 if char in "{[" else -1
                if not self._depth:
                    self.is_complete = True
                    return text[:place], text[place:]
        return text, ""


class TaggedReader:
    """Reads arguments between tags incrementally, and returns them as one JSON object.

    Args:
        tags: The tags around them.
        after: Text after the last argument.
        are_texts: By name, whether an argument is a string. The value of an unknown name is read as JSON if it is JSON,
            else as a string.

    Attributes:
        is_complete: True once all arguments were read.
    """

    def __init__(self, tags: TaggedArguments, after: str, are_texts: Mapping[str, bool]) -> None:
        self._tags = tags
        self._after = after
        self._are_texts = are_texts
        self._is_first = True
        self.is_complete = False

    def read(self, text: str) -> tuple[str, str]:
        """See JsonReader.read. An argument is returned once it is complete."""
        tags, told = self._tags, []
        while text:
            if text.startswith(self._after):
                self.is_complete = True
                told.append("{}" if self._is_first else "}")
                break
            key, has_key, rest = text.removeprefix(tags.before).partition(tags.between)
            value, is_whole, rest = rest.partition(tags.after)
            if not text.startswith(tags.before) or not has_key or not is_whole:
                break
            told.append(f"{'{' if self._is_first else ', '}{json.dumps(key, ensure_ascii=False)}: ")
            told.append(self._value(key, value))
            self._is_first = False
            text = rest
        return "".join(told), text

    def _value(self, key: str, value: str) -> str:
        if not self._are_texts.get(key, False):
            try:
                json.loads(value, parse_constant=_refuse)
            except (ValueError, RecursionError):
                pass
            else:
                return value
        return json.dumps(value, ensure_ascii=False)
