"""A linear model of the time of a decode step over its number of rows."""

_MEMORY = 0.98
"""Factor by which each observation's weight decays with the next one: some fifty steps are remembered."""

_LEAST = 8
"""Observations before the line is used."""

_LEAST_VARIANCE = 0.01
"""Added to the variance of the rows, in rows squared. If the rows hardly varied, the estimated cost of one goes to
0."""

_LONGEST = 2.0
"""A step counts as at most this multiple of its predicted duration, because longer ones were disturbed by other
processes."""


class RowTimes:
    """Least squares with forgetting over steps of decodes alone, which gives the cost of one more row after few steps.
    (Schedulers get another model, which includes prompts: `StepTimeFit`.)

    An unknown cost counts as 0, so that drafts are tried: if all recent steps had the same number of rows, one more row
    costs 0. The first step with a number of rows is not counted, because it may be recorded, which takes longer
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
        """True once there were enough observations."""
        return self._num_observed >= _LEAST

    @property
    def per_row(self) -> float:
        """Seconds for one more row, at least 0."""
        weight, rows, squares, seconds, products = self._sums
        mean = rows / weight
        covariance = products / weight - mean * seconds / weight
        return max(0.0, covariance / (squares / weight - mean * mean + _LEAST_VARIANCE))

    def seconds(self, rows: int) -> float:
        """Predict the seconds of a step with this many rows."""
        weight, sum_of_rows, _, seconds, _ = self._sums
        return max(0.0, seconds / weight + self.per_row * (rows - sum_of_rows / weight))

    def observe(self, rows: int, seconds: float) -> None:
        """Add the measured time of a step of decodes, in seconds."""
        self.most_rows = max(self.most_rows, rows)
        if rows not in self._known_rows:
            self._known_rows.add(rows)
            return
        if self.is_known:
            seconds = min(seconds, _LONGEST * self.seconds(rows))
        terms = (1.0, rows, rows * rows, seconds, rows * seconds)
        self._sums = [_MEMORY * total + term for total, term in zip(self._sums, terms, strict=True)]
        self._num_observed += 1
