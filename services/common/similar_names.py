"""Finds the name that a misspelt one most likely means."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the end of a refusal of an unknown name: the one it is nearest to. Empty where none is near."""
    nearest = difflib.get_close_matches(name, list(known), 1, cutoff=0.5)
    return f"; did you mean {nearest[0]}?" if nearest else ""
