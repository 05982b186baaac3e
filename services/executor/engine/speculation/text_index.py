"""Repetitions: places in a text at which its last tokens, or those of another one, stood before."""

from collections.abc import Sequence
from typing import NamedTuple

GRAM = 3
"""Tokens that must be the same for a text to be taken for a repetition: two are so often enough by chance."""

LONGEST_MATCH = 16
"""Tokens that are compared; a repetition of more is as sure as one of so many."""


FORCED = LONGEST_MATCH + 1
"""Stands for a match of tokens whose text a grammar leaves no choice about."""


class Match(NamedTuple):
    """`text[at - length : at]` are the last tokens of a context; what may come next begins at `at`."""

    text: Sequence[int]
    at: int
    length: int


class TextIndex:
    """Knows for each run of `GRAM` tokens of a text where it stood last. The text may grow; memory is some 150 bytes
    per token.

    Args:
        text: Tokens. Whoever has them may append to them.
        start: First token that is looked at.
    """

    def __init__(self, text: Sequence[int], start: int = 0) -> None:
        self._text = text
        self._num_known = max(start, 0) + GRAM
        self._next: dict[tuple[int, ...], int] = {}

    def extend(self, most: int) -> None:
        """Take note of what was appended since the last call, `most` tokens at a time."""
        text, first = self._text, self._num_known
        end = min(len(text), first + most)
        for at in range(first, end):
            self._next[tuple(text[at - GRAM : at])] = at
        self._num_known = max(first, end)

    def find(self, context: Sequence[int]) -> Match | None:
        """Return where the last tokens of a context stood last, with what follows them."""
        at = self._next.get(tuple(context[-GRAM:]))
        return None if at is None else Match(self._text, at, match_length(self._text, at, context))


def match_length(text: Sequence[int], at: int, context: Sequence[int]) -> int:
    """Return how many tokens before `at` are the last ones of the context, up to LONGEST_MATCH."""
    most = min(at, len(context), LONGEST_MATCH)
    for length in range(most):
        if text[at - 1 - length] != context[-1 - length]:
            return length
    return most
