"""Seconds of decode steps, as a line over their rows."""

_MEMORY = 0.98
"""Weight of an observation after the next one: some fifty steps are remembered."""

_LEAST = 8
"""Observations before there is a line."""

_LEAST_VARIANCE = 0.01
"""Variance of rows, in rows squared, below which a row's cost counts as unknown: it is taken for less than it seems."""

_LONGEST = 2.0
"""A step counts as at most so many times as long as the line says: somebody else had the processor."""


class RowTimes:
    """Least squares with forgetting over the steps of decodes alone. Schedulers are told another line, which knows
    prompts as well (`StepTimeFit`); this one is to tell soon, and of few steps, what one row more costs.

    What is not known is taken for free, and so is tried: where all steps of late had as many rows, a row more costs 0.
    The first step of a number of rows does not count, as it may take longer: for being recorded
    (`RecordedDecode`).

    Attributes:
        most_rows: Most rows of a step.
    """

    def __init__(self) -> None:
        self._num_observed = 0
        # Sums of 1, rows, squares of rows, seconds, and rows times seconds.
        self._sums = [0.0] * 5
        self._known_rows: set[int] = set()
        self.most_rows = 0

    @property
    def is_known(self) -> bool:
        """True once there is a line."""
        return self._num_observed >= _LEAST

    @property
    def per_row(self) -> float:
        """Seconds of one row more, at least 0."""
        weight, rows, squares, seconds, products = self._sums
        mean = rows / weight
        covariance = products / weight - mean * seconds / weight
        return max(0.0, covariance / (squares / weight - mean * mean + _LEAST_VARIANCE))

    def seconds(self, rows: int) -> float:
        """Return how long a step of so many rows takes."""
        weight, sum_of_rows, _, seconds, _ = self._sums
        return max(0.0, seconds / weight + self.per_row * (rows - sum_of_rows / weight))

    def observe(self, rows: int, seconds: float) -> None:
        """A step has been taken."""
        self.most_rows = max(self.most_rows, rows)
        if rows not in self._known_rows:
            self._known_rows.add(rows)
            return
        if self.is_known:
            seconds = min(seconds, _LONGEST * self.seconds(rows))
        terms = (1.0, rows, rows * rows, seconds, rows * seconds)
        self._sums = [_MEMORY * total + term for total, term in zip(self._sums, terms, strict=True)]
        self._num_observed += 1
