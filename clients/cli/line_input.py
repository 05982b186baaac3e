'''Messages typed at a terminal: lines, pasted text, and blocks between """, with a history that is kept.'''

from __future__ import annotations

import contextlib
import os
from pathlib import Path

_BLOCK = '"""'
_MOST_LINES = 1000


class LineInput:
    """Reads messages with the terminal's own line editing.

    What is pasted is one message, whatever line breaks it has: the terminal marks it (bracketed paste), and its line
    breaks do not end the line.

    Args:
        history: File with the lines of earlier chats; only its user can read it.
        marks_paste: True if the terminal can mark what is pasted; one that is dumb would show the request for it.
    """

    def __init__(self, history: Path, *, marks_paste: bool = True) -> None:
        import readline  # line editing for input(), on a terminal only

        self._readline = readline
        self._history = history
        if marks_paste:
            readline.parse_and_bind("set enable-bracketed-paste on")
        readline.set_history_length(_MOST_LINES)
        with contextlib.suppress(OSError):  # none yet, or none that can be read
            readline.read_history_file(history)

    def read(self, prompt: str = "> ") -> str:
        """Return the next message or command, without the white space around it. Raises EOFError."""
        line = input(prompt)
        text = line.strip()
        if not text.startswith(_BLOCK):
            return text
        lines = [text.removeprefix(_BLOCK)]
        while not lines[-1].rstrip().endswith(_BLOCK):
            lines.append(input("... "))
        lines[-1] = lines[-1].rstrip().removesuffix(_BLOCK)
        return "\n".join(lines).strip("\n")

    def save(self) -> None:
        """Write the history; a folder that cannot be written to costs the history and nothing else."""
        with contextlib.suppress(OSError):
            self._history.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(self._history, os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW, 0o600))
            self._readline.write_history_file(self._history)
