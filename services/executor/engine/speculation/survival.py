"""Chances that drafts are right, from what became of the drafts of late."""

from scalellm.services.executor.engine.speculation.text_index import FORCED

_MEMORY = 0.98
"""Weight of a draft's outcome after the next one."""

_PRIOR = 4.0
"""Number of outcomes that the expectation counts as."""


class Survival:
    """The share of drafts that were right, by how many tokens before them were those of the text they are taken from.

    Args:
        before: Expectation where little is known; None = even chances.
    """

    def __init__(self, before: "Survival | None" = None) -> None:
        self._before = before
        self._right = [0.0] * (FORCED + 1)
        self._tried = [0.0] * (FORCED + 1)

    def chance(self, length: int) -> float:
        """Return how likely a token is to come behind a match of so many tokens; see Draft.length_at."""
        expected = 0.5 if self._before is None else self._before.chance(length)
        return (self._right[length] + _PRIOR * expected) / (self._tried[length] + _PRIOR)

    def observe(self, length: int, *, is_right: bool) -> None:
        """Count a guess of this match length as right or wrong."""
        self._right[length] = _MEMORY * self._right[length] + is_right
        self._tried[length] = _MEMORY * self._tried[length] + 1.0
        if self._before is not None:
            self._before.observe(length, is_right=is_right)
