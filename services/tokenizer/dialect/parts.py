"""The parts of an answer."""

from __future__ import annotations

import enum
from typing import NamedTuple


class PartKind(enum.Enum):
    """The kind of a part of an answer."""

    TEXT = enum.auto()
    REASONING = enum.auto()
    CALL = enum.auto()


class Part(NamedTuple):
    """A part of an answer, or more of one.

    Attributes:
        kind: Kind of the part.
        text: New text of it; of a call, its arguments as JSON.
        number: Number of the call in the answer, from 0 on.
        call_id: Id of a call that begins; empty where one goes on.
        name: Function of a call that begins.
    """

    kind: PartKind
    text: str
    number: int = 0
    call_id: str = ""
    name: str = ""


def num_begun(text: str, mark: str) -> int:
    """Return how many of the last characters of a text are the beginning of a mark, which is not in it."""
    most = min(len(text), len(mark) - 1)
    place = text.find(mark[0], len(text) - most)
    while place >= 0:
        if mark.startswith(text[place:]):
            return len(text) - place
        place = text.find(mark[0], place + 1)
    return 0
