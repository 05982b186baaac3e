"""Reads the arguments of calls while they are written."""

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
    """Reads one JSON object, and tells it as it is.

    Attributes:
        is_complete: All of it was read.
    """

    def __init__(self) -> None:
        self._depth = 0
        self._is_string = False
        self._is_escaped = False
        self.is_complete = False

    def read(self, text: str) -> tuple[str, str]:
        """Return what is told of the arguments, and what follows them or is to be read again with more text."""
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
    """Reads arguments that come one by one, and tells the JSON object of them.

    Args:
        tags: The tags around them.
        after: Text behind the last one.
        are_texts: True for arguments that are strings, false for those that are not, by their names. A value of another
            name is what JSON it is, or else a string.

    Attributes:
        is_complete: All of them were read.
    """

    def __init__(self, tags: TaggedArguments, after: str, are_texts: Mapping[str, bool]) -> None:
        self._tags = tags
        self._after = after
        self._are_texts = are_texts
        self._is_first = True
        self.is_complete = False

    def read(self, text: str) -> tuple[str, str]:
        """As JsonReader.read: an argument is told once it is complete."""
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
