"""The one way out to the user: whatever a peer sent is made harmless here before a terminal sees it.

Servers, metrics endpoints, logs and models are peers. What they send may hold characters that a terminal obeys instead
of showing (escape sequences, C1 controls) or that reorder or hide what stands beside them (bidirectional controls,
invisible marks). Messages, tables and progress, which are all printed by a `Terminal`, lose them wherever they go. The
text that a user asked for keeps them where it goes into a pipe or a file, and only there.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from typing import IO, Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

# Joiners (U+200C, U+200D), soft hyphens and visible format characters stay: scripts and emojis are written with them.
_HARMFUL = re.compile(
    "["
    "\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters but tab and line feed
    "\u061c\u200e\u200f\u202a-\u202e"  # marks and embeddings of direction
    "\u2028\u2029"  # line and paragraph separators
    "\u2060-\u206f"  # isolates of direction, invisible operators, deprecated format characters
    "\ufeff\ufff9-\ufffb"  # byte order mark, annotations
    "\ud800-\udfff"  # lone surrogates
    "\U000e0000-\U000e007f"  # tags, which are read by machines and seen by nobody
    "]"
)


def printable(text: str) -> str:
    """The text without the characters that a terminal obeys, or that change how others are shown."""
    return _HARMFUL.sub("", text)


def one_line(text: str) -> str:
    """The same on one line, for names and messages: a line break would let them pass for lines of our own."""
    return " ".join(printable(text).split())


class Terminal(Console):
    """A console that prints nothing but `printable` text, takes no markup, and leaves a closed pipe to main.

    Args:
        file: Output, if it is neither standard output nor standard error.
        stderr: Print to standard error.
        width: Columns; default: the terminal's.
    """

    def __init__(self, *, file: IO[str] | None = None, stderr: bool = False, width: int | None = None) -> None:
        super().__init__(file=file, stderr=stderr, width=width, markup=False, emoji=False, highlight=False)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Called by rich for everything that it prints, parts of tables and of live displays included."""
        for segment in super().render(renderable, options):
            # Segments marked as control are rich's own: moves of the cursor.
            yield segment if segment.control else segment._replace(text=printable(segment.text))

    def on_broken_pipe(self) -> None:
        """Called by rich while it handles a BrokenPipeError: rich itself would exit with 1."""
        raise


def write_text(text: str) -> None:
    """Write part of an answer at once: printable on a terminal, else exactly as it is."""
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def write_line(text: object) -> None:
    """Write a line of our own result."""
    write_text(f"{printable(str(text))}\n")


def write_json(document: Any) -> None:
    """Write one line of JSON. What is not printable is escaped: whoever parses it gets exactly what there was."""
    text = json.dumps(document, ensure_ascii=False)
    write_text(f"{_HARMFUL.sub(lambda found: json.dumps(found[0])[1:-1], text)}\n")
