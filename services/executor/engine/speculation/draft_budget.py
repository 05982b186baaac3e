"""The number of drafts of a step."""

import heapq
from collections.abc import Sequence

from scalellm.services.executor.engine.batch import ScheduledBatch
from scalellm.services.executor.engine.speculation.row_times import RowTimes

_MARGIN = 1.15
"""Factor by which a draft must be worth more than it costs: chances and costs are estimates."""

_LEAST_CHANCE = 0.1
"""Chance below which nothing is tried, however little a row seems to cost."""


class DraftBudget:
    """Takes a draft if tokens per second rise with it, by the chance that it is right and by how long steps take.

    A step of R rows brings N tokens in T seconds. One row more costs c seconds, whoever it is of, and brings a token
    with the chance p that its draft and all before it are right; so it pays if p / c > N / T. With many rows beside
    it a step is mostly their cost, and nothing is sure enough: there are no drafts under load.

    Args:
        target_itl: Most seconds of a step with drafts; None = as long as it pays.
        times: Seconds of steps, measured.
    """

    def __init__(self, target_itl: float | None, times: RowTimes | None = None) -> None:
        self._target_itl = float("inf") if target_itl is None else target_itl
        self._times = times or RowTimes()

    def observe(self, batch: ScheduledBatch, seconds: float) -> None:
        """A step has been taken."""
        if batch.num_decodes and not batch.num_prefill_tokens:
            self._times.observe(batch.num_decodes, seconds)

    def room(self, batch: ScheduledBatch) -> int:
        """Return how many drafts a step of decodes may take if all are sure: none before there are measurements, and
        no more than make double the rows that were measured.
        """
        times, rows = self._times, batch.num_decodes
        if not times.is_known or _MARGIN * rows * times.per_row > times.seconds(rows):
            return 0
        return 2 * times.most_rows - rows

    def divide(self, batch: ScheduledBatch, chances: Sequence[Sequence[float]], room: int) -> list[int]:
        """Return how many drafts of each sequence a step of decodes takes.

        Args:
            batch: The step.
            chances: For each sequence, and each token of its draft: the chance that it is right if those before it are.
            room: Most drafts of the step.
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
