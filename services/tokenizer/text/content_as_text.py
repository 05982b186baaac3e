"""Encoding of special tokens' texts in users' messages as plain text, while the template's own are special tokens.

A tokenizer recognises special tokens' texts anywhere in a rendered template. So before contents are given to the
template, a mark is put inside every special token's text in them. In the rendered text, only texts without a mark are
special tokens; without its marks, it is the intended text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tokenizers import AddedToken, Tokenizer

_MARKS = range(0xE000, 0xF900)  # the private use area: characters that no text has by agreement


@dataclass(frozen=True, slots=True)
class MarkedText:
    """A rendered conversation.

    Attributes:
        text: The text with marks.
        mark: The mark, a character that occurs nowhere else in the text; empty: the text has no marks.
    """

    text: str
    mark: str = ""

    @property
    def plain(self) -> str:
        """The text without marks."""
        return self.text.replace(self.mark, "") if self.mark else self.text

    def rest(self, start: int) -> MarkedText:
        """Return the text after the first `start` characters of `plain`."""
        place, num_marks = start, -1
        while self.mark and (now := self.text.count(self.mark, 0, place)) != num_marks:
            place, num_marks = start + now, now
        return MarkedText(self.text[place:], self.mark)

    def after(self, text: str) -> MarkedText:
        """Return this text appended to `text`, which has no marks."""
        return MarkedText(text + self.text, self.mark)


class SpecialTexts:
    """The special tokens of a tokenizer, by their texts. Immutable.

    Args:
        tokenizer: The tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        added = tokenizer.get_added_tokens_decoder().items()
        self._tokens: dict[str, tuple[int, AddedToken]] = {
            token.content: (token_id, token) for token_id, token in added if token.special
        }
        self._pattern = re.compile(_any_of(self._tokens) or r"(?!)")
        self._tokenizer = tokenizer

    @cached_property
    def are_alone(self) -> bool:
        """True if a text after a special token is encoded as if it stood alone."""
        encode = self._tokenizer.encode
        return not self._tokens or any(
            encode(text + "x", add_special_tokens=False).ids == [token_id, *encode("x", add_special_tokens=False).ids]
            for text, (token_id, _) in self._tokens.items()
        )

    def choose_mark(self, texts: Sequence[str]) -> str:
        """Return a character that is in none of the texts, nor in a special token."""
        known = (*texts, *self._tokens)
        return next(mark for mark in map(chr, _MARKS) if not any(mark in text for text in known))

    def mark(self, text: str, mark: str) -> str:
        """Return `text` with a mark inside each special token's text, so that none is recognised."""
        while (marked := self._pattern.sub(lambda found: mark.join(found[0]), text)) != text:
            text = marked  # a special token's text may overlap another one
        return text

    def mark_all(self, value: Any, mark: str) -> Any:
        """Return a JSON value with all of its texts marked."""
        if isinstance(value, str):
            return self.mark(value, mark)
        if isinstance(value, list):
            return [self.mark_all(item, mark) for item in value]
        if isinstance(value, dict):
            return {self.mark(name, mark): self.mark_all(item, mark) for name, item in value.items()}
        return value

    def split(self, text: MarkedText) -> list[str | int]:
        """Return the special tokens' ids and the texts between them, in order, without marks and empty texts."""
        parts: list[str | int] = []
        place, strips_next = 0, False
        for found in self._pattern.finditer(text.text):
            token_id, token = self._tokens[found[0]]
            piece = text.text[place : found.start()]
            piece = piece.lstrip() if strips_next else piece
            parts += [piece.rstrip() if token.lstrip else piece, token_id]
            place, strips_next = found.end(), token.rstrip
        piece = text.text[place:]
        parts.append(piece.lstrip() if strips_next else piece)
        plain = (part if isinstance(part, int) else MarkedText(part, text.mark).plain for part in parts)
        return [part for part in plain if part != ""]


def _any_of(texts: Iterable[str]) -> str:
    """Return a regular expression that matches the longest of the texts at a position. It is built as a tree of common
    prefixes, because alternatives of thousands of texts would make a text of many `<` expensive.
    """
    by_first: dict[str, list[str]] = {}
    for text in texts:
        by_first.setdefault(text[:1], []).append(text[1:])
    ends = by_first.pop("", None) is not None
    branches = [re.escape(first) + _any_of(rests) for first, rests in sorted(by_first.items())]
    if not branches:
        return ""
    return f"(?:{'|'.join(branches)}){'?' if ends else ''}"
