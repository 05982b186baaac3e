"""Acceptance probabilities of draft tokens, from the outcomes of recent ones."""

from scalellm.services.executor.engine.speculation.text_index import FORCED

_MEMORY = 0.98
"""Factor by which each outcome's weight decays with the next one."""

_PRIOR = 4.0
"""Number of outcomes that the prior counts as."""


class Survival:
    """The share of draft tokens that were correct, by the length of the match before them.

    Args:
        before: Prior for lengths with few outcomes; None = 1/2.
    """

    def __init__(self, before: "Survival | None" = None) -> None:
        self._before = before
        self._right = [0.0] * (FORCED + 1)
        self._tried = [0.0] * (FORCED + 1)

    def chance(self, length: int) -> float:
        """Return the probability that a draft token after a match of this length is correct; see Draft.length_at."""
        expected = 0.5 if self._before is None else self._before.chance(length)
        return (self._right[length] + _PRIOR * expected) / (self._tried[length] + _PRIOR)

    def observe(self, length: int, *, is_right: bool) -> None:
        """Count a draft token after a match of this length as correct or wrong."""
        self._right[length] = _MEMORY * self._right[length] + is_right
        self._tried[length] = _MEMORY * self._tried[length] + 1.0
        if self._before is not None:
            self._before.observe(length, is_right=is_right)
