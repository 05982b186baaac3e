"""A linear model of the time of a step over the numbers of its tokens, fitted to measured steps."""

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass

from scalellm.services.executor.engine.batch import ScheduledBatch

_EVERY = 4
"""One of this many steps is observed, because the model changes slowly and there are many steps."""

_MEMORY = 0.998
"""Factor by which each observation's weight decays with the next one: a few hundred steps are remembered."""

_LEAST = 8
"""Observations before the model is used."""

_RIDGE = 1e-3
"""Weight of each coefficient's last value, as a share of an observation of its size. A coefficient whose feature did
not vary in the observed steps so keeps its value."""

_SIZES = (1.0, 16.0, 256.0, 16_384.0)
"""Typical values of the four features (constant, rows, prompt tokens, context tokens), which scale the ridge."""


@dataclass(frozen=True, slots=True)
class StepTimeModel:
    """Seconds of a step: base, plus per prefill token, per decoding sequence, and per token of decode context."""

    base: float
    per_prefill_token: float
    per_decode: float
    per_context_token: float

    def is_close(self, other: "StepTimeModel") -> bool:
        """True if no coefficient differs by more than 2 %."""
        return all(
            math.isclose(mine, theirs, rel_tol=0.02) for mine, theirs in zip(astuple(self), astuple(other), strict=True)
        )

    def seconds(self, batch: ScheduledBatch) -> float:
        """Predict the seconds of a step."""
        context = sum(s.start + 1 for s in batch.sequences[: batch.num_decodes])
        return (
            self.base
            + self.per_prefill_token * batch.num_prefill_tokens
            + self.per_decode * batch.num_decodes
            + self.per_context_token * context
        )


class StepTimeFit:
    """Fits the model to an engine's own steps: least squares with forgetting, no coefficient below 0."""

    def __init__(self) -> None:
        self._num_steps = 0
        self._num_observed = 0
        # Sums of products of the four features with each other and with the seconds.
        self._products = [[0.0] * 4 for _ in range(4)]
        self._sums = [0.0] * 4
        self._line = [0.0] * 4
        self._is_stale = False

    def observe(self, batch: ScheduledBatch, seconds: float) -> None:
        """Add the measured time of a step, in seconds."""
        self._num_steps += 1
        if self._num_steps % _EVERY and self._num_observed >= _LEAST:
            return
        context = sum(scheduled.start + 1 for scheduled in batch.sequences[: batch.num_decodes])
        features = (1.0, float(batch.num_decodes), float(batch.num_prefill_tokens), float(context))
        for row, feature in zip(self._products, features, strict=True):
            for place, other in enumerate(features):
                row[place] = _MEMORY * row[place] + feature * other
        for place, feature in enumerate(features):
            self._sums[place] = _MEMORY * self._sums[place] + feature * seconds
        self._num_observed += 1
        self._is_stale = True

    def line(self) -> StepTimeModel | None:
        """Return the fitted model; None before there were enough observations."""
        if self._num_observed < _LEAST:
            return None
        if self._is_stale:
            self._line = _solve(self._products, self._sums, self._line)
            self._is_stale = False
        base, per_decode, per_prefill_token, per_context_token = self._line
        return StepTimeModel(base, per_prefill_token, per_decode, per_context_token)


def _solve(products: Sequence[Sequence[float]], sums: Sequence[float], before: Sequence[float]) -> list[float]:
    """Return the coefficients with the least squared error, none below 0, near `before` where observations do not
    decide.
    """
    weights = [_RIDGE * products[0][0] * size**2 for size in _SIZES]
    active = list(range(4))
    while active:
        matrix = [
            [products[i][j] + weights[i] * (i == j) for j in active] + [sums[i] + weights[i] * before[i]]
            for i in active
        ]
        found = _eliminate(matrix)
        lowest = min(range(len(active)), key=found.__getitem__)
        if found[lowest] >= 0.0:
            line = [0.0] * 4
            for place, value in zip(active, found, strict=True):
                line[place] = value
            return line
        del active[lowest]
    return [0.0] * 4


def _eliminate(matrix: list[list[float]]) -> list[float]:
    """Solve a linear system by Gauss-Jordan elimination with the largest pivot. The last column is the right-hand side;
    the other columns are positive definite.
    """
    size = len(matrix)
    for column in range(size):
        pivot = max(range(column, size), key=lambda row: abs(matrix[row][column]))
        matrix[column], matrix[pivot] = matrix[pivot], matrix[column]
        scale = matrix[column][column]
        matrix[column] = [value / scale for value in matrix[column]]
        for row in range(size):
            if row != column and (factor := matrix[row][column]):
                matrix[row] = [a - factor * b for a, b in zip(matrix[row], matrix[column], strict=True)]
    return [row[size] for row in matrix]
