"""The number of drafts of a step."""

import heapq
from collections.abc import Sequence

from scalellm.services.executor.engine.batch import ScheduledBatch
from scalellm.services.executor.engine.step_time import StepTimeFit

_MARGIN = 1.15
"""By so much a draft must be worth more than it costs: chances and costs are estimates."""


class DraftBudget:
    """Takes a draft if tokens per second rise with it, by the chance that it is right and by how long steps take.

    A step of R rows brings N tokens in T seconds. One row more costs c seconds, whoever it is of, and brings a token
    with the chance p that its draft and all before it are right; so it pays if p / c > N / T. With many rows beside
    it a step is mostly their cost, and nothing is sure enough: there are no drafts under load.

    Args:
        step_times: Seconds of steps by what they computed, measured.
        target_itl: Most seconds of a step with drafts; None = as long as it pays.
    """

    def __init__(self, step_times: StepTimeFit, target_itl: float | None) -> None:
        self._step_times = step_times
        self._target_itl = float("inf") if target_itl is None else target_itl

    def room(self, batch: ScheduledBatch) -> int:
        """Return how many drafts a step of decodes may take if all are sure: none before there are measurements, and
        no more than double the rows that were measured.
        """
        line, rows = self._step_times.line(), batch.num_decodes
        if line is None or _MARGIN * rows * line.per_decode >= line.seconds(batch):
            return 0
        return 2 * self._step_times.most_rows - rows

    def divide(self, batch: ScheduledBatch, chances: Sequence[Sequence[float]], room: int) -> list[int]:
        """Return how many drafts of each sequence a step of decodes takes.

        Args:
            batch: The step.
            chances: For each sequence, and each token of its draft: the chance that it is right if those before it are.
            room: Most drafts of the step.
        """
        counts = [0] * len(chances)
        if (line := self._step_times.line()) is None:
            return counts
        seconds, tokens = line.seconds(batch), float(batch.num_decodes)
        best = [(-of_sequence[0], place) for place, of_sequence in enumerate(chances) if of_sequence]
        heapq.heapify(best)
        while best and room > 0:
            chance, place = -best[0][0], best[0][1]
            context = batch.sequences[place].start + 2 + counts[place]
            cost = line.per_decode + line.per_context_token * context
            if chance * seconds <= _MARGIN * cost * tokens or seconds + cost > self._target_itl:
                break
            counts[place] += 1
            seconds, tokens, room = seconds + cost, tokens + chance, room - 1
            if counts[place] < len(chances[place]):
                heapq.heapreplace(best, (-chance * chances[place][counts[place]], place))
            else:
                heapq.heappop(best)
        return counts
