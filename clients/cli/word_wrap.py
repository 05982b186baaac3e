"""Text that comes piece by piece, broken between words at the width of a terminal."""

from __future__ import annotations

import re
from collections.abc import Callable

from rich.cells import cell_len

_PIECES = re.compile(r"\n|[^\S\n]+|[^\s]+")
_LONGEST_HELD = 40
"""Columns of a word that are held back until its end is seen; a longer one is broken wherever the terminal does."""


class WordWrap:
    """Breaks lines between words. A word is written once the text goes on after it.

    Args:
        write: Writes the text.
        width: Columns of a line, asked at each word, as a terminal may change its own.
    """

    def __init__(self, write: Callable[[str], None], width: Callable[[], int]) -> None:
        self._write = write
        self._width = width
        self._column = 0
        self._space = ""
        self._word = ""

    def feed(self, text: str) -> None:
        """Take the next piece."""
        for piece in _PIECES.findall(text):
            if piece == "\n":
                self.flush()
                self._space = ""  # it would stand at the end of the line
                self._write("\n")
                self._column = 0
            elif piece.isspace():
                self.flush()
                self._space += piece
            else:
                for character in piece:
                    self._add(character)

    def flush(self) -> None:
        """Write what is held back."""
        word, self._word = self._word, ""
        if not word:
            return
        width, space = cell_len(word), cell_len(self._space)
        if self._column and self._column + space + width > self._width():
            self._write(f"\n{word}")
            self._column = width
        else:
            self._write(self._space + word)
            self._column += space + width
        self._space = ""

    def _add(self, character: str) -> None:
        # Scripts whose characters are two columns wide have no spaces: a line may be broken at each of them.
        is_wide = cell_len(character) > 1
        if is_wide:
            self.flush()
        self._word += character
        if is_wide or len(self._word) >= _LONGEST_HELD:
            self.flush()
