"""Search for repetitions: earlier occurrences, in a text, of the last tokens of that text or of another one."""

from collections.abc import Sequence
from typing import NamedTuple

GRAM = 3
"""Tokens that must match for a repetition. Two match too often by chance."""

LONGEST_MATCH = 16
"""Most tokens that are compared. A longer match predicts no better."""


FORCED = LONGEST_MATCH + 1
"""Match length that stands for tokens whose text a grammar leaves no choice about."""


class Match(NamedTuple):
    """An occurrence of a context's last tokens, `text[at - length : at]`. The predicted next tokens begin at `at`."""

    text: Sequence[int]
    at: int
    length: int


class TextIndex:
    """Index of the latest occurrence of each run of `GRAM` tokens in a text that may grow. It takes some 150 bytes per
    token.

    Args:
        text: The tokens. The owner may append to them.
        start: Index of the first token that is indexed.
    """

    def __init__(self, text: Sequence[int], start: int = 0) -> None:
        self._text = text
        self._num_known = max(start, 0) + GRAM
        self._next: dict[tuple[int, ...], int] = {}

    def extend(self, most: int) -> None:
        """Index tokens that were appended since the last call, at most `most` of them."""
        text, first = self._text, self._num_known
        end = min(len(text), first + most)
        for at in range(first, end):
            self._next[tuple(text[at - GRAM : at])] = at
        self._num_known = max(first, end)

    def find(self, context: Sequence[int]) -> Match | None:
        """Return the latest occurrence of a context's last tokens that tokens follow; None if there is none."""
        at = self._next.get(tuple(context[-GRAM:]))
        return None if at is None else Match(self._text, at, match_length(self._text, at, context))


def match_length(text: Sequence[int], at: int, context: Sequence[int]) -> int:
    """Return the number of tokens before `at` that equal the last ones of the context, up to LONGEST_MATCH."""
    most = min(at, len(context), LONGEST_MATCH)
    for length in range(most):
        if text[at - 1 - length] != context[-1 - length]:
            return length
    return most
