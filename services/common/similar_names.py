"""Suggestions for misspelt names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a suggestion, the nearest known name, to append to an error about an unknown name; empty if none
    is near.
    """
    nearest = difflib.get_close_matches(name, list(known), 1, cutoff=0.5)
    return f"; did you mean {nearest[0]}?" if nearest else ""
