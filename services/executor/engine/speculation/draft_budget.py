"""The number of drafted tokens in a step."""

import heapq
from collections.abc import Sequence

from scalellm.services.executor.engine.batch import ScheduledBatch
from scalellm.services.executor.engine.speculation.row_times import RowTimes

_MARGIN = 1.15
"""Factor by which a draft token's expected gain must exceed its cost, because both are estimates."""

_LEAST_CHANCE = 0.1
"""Least acceptance probability of a draft token, however little a row seems to cost."""


class DraftBudget:
    """Takes a draft token if it raises the expected tokens per second, by its acceptance probability and step times.

    A step of R rows yields N tokens in T seconds. One more row costs c seconds and yields a token with the probability
    p that its draft token and all before it are accepted, so it pays if p / c > N / T. In a large batch the rows
    dominate T and no p is high enough, so there are no drafts under load.

    Args:
        target_itl: Most seconds of a step with drafts; None = no limit.
        times: Measured step times.
    """

    def __init__(self, target_itl: float | None, times: RowTimes | None = None) -> None:
        self._target_itl = float("inf") if target_itl is None else target_itl
        self._times = times or RowTimes()

    def observe(self, batch: ScheduledBatch, seconds: float) -> None:
        """Add the measured time of a step; only those without prefill count."""
        if batch.num_decodes and not batch.num_prefill_tokens:
            self._times.observe(batch.num_decodes, seconds)

    def room(self, batch: ScheduledBatch) -> int:
        """Return how many draft tokens a step of decodes may take if all of them were certain: 0 before there are
        enough measurements, and never more than double the most rows that were measured.
        """
        times, rows = self._times, batch.num_decodes
        if not times.is_known or _MARGIN * rows * times.per_row > times.seconds(rows):
            return 0
        return 2 * times.most_rows - rows

    def divide(self, batch: ScheduledBatch, chances: Sequence[Sequence[float]], room: int) -> list[int]:
        """Choose how many draft tokens of each sequence a step of decodes takes.

        Args:
            batch: The step.
            chances: For each sequence, and each token of its draft: the probability that it is accepted if those before
                it are.
            room: Most draft tokens in the step.

        Returns:
            The number of draft tokens of each sequence.
        """
        counts = [0] * len(chances)
        cost, seconds, tokens = self._times.per_row, self._times.seconds(batch.num_decodes), float(batch.num_decodes)
        best = [(-of_sequence[0], place) for place, of_sequence in enumerate(chances) if of_sequence]
        heapq.heapify(best)
        while best and room > 0:
            chance, place = -best[0][0], best[0][1]
            is_worth_it = chance >= _LEAST_CHANCE and chance * seconds >= _MARGIN * cost * tokens
            if not is_worth_it or seconds + cost > self._target_itl:
                break
            counts[place] += 1
            seconds, tokens, room = seconds + cost, tokens + chance, room - 1
            if counts[place] < len(chances[place]):
                heapq.heapreplace(best, (-chance * chances[place][counts[place]], place))
            else:
                heapq.heappop(best)
        return counts
