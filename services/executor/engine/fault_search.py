"""Finds the request with which the model runner fails, among those of a step that failed."""

from collections import deque
from collections.abc import Sequence as Items
from dataclasses import dataclass

from scalellm.services.executor.engine.sequence import SequenceGroup, SequenceStatus


@dataclass(frozen=True, slots=True)
class _Suspect:
    """A request of a failed step. It is cleared once each of its samples has one more token than at the failure."""

    group: SequenceGroup
    num_tokens: dict[int, int]

    @property
    def is_cleared(self) -> bool:
        """True if the request has passed the point of the failed step, or has ended."""
        return all(
            seq.status is SequenceStatus.FINISHED or len(seq.token_ids) > self.num_tokens[seq.index]
            for seq in self.group.samples
        )


class FaultSearch:
    """Finds the culprit by bisection: the suspects run by halves, and a half with which a step fails is divided again,
    down to a single request.

    No other requests run meanwhile. One of k requests is found within 2 log2 k failed steps. If no request was to blame
    and the fault does not recur, all go on.
    """

    def __init__(self) -> None:
        self._trials: deque[list[_Suspect]] = deque()

    def divide(self, groups: Items[SequenceGroup]) -> None:
        """Divide the requests of a failed step into halves that are tried one after the other. One that is left of
        several is tried, too, because the culprit may have been one that has ended since.
        """
        suspects = [_Suspect(group, {seq.index: len(seq.token_ids) for seq in group.samples}) for group in groups]
        tried = {group.arrival for group in groups}
        rest = [[other for other in trial if other.group.arrival not in tried] for trial in self._trials]
        middle = len(suspects) // 2
        self._trials = deque((suspects[:middle], suspects[middle:], *rest))

    def on_trial(self) -> dict[int, SequenceGroup] | None:
        """Return the only requests that may run now, by arrival; None = all may run."""
        while self._trials:
            self._trials[0] = [suspect for suspect in self._trials[0] if not suspect.is_cleared]
            if self._trials[0]:
                return {suspect.group.arrival: suspect.group for suspect in self._trials[0]}
            self._trials.popleft()
        return None
