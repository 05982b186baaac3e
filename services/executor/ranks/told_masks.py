"""Masks of grammars, which rank 0 computes and sends to the other ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from scalellm.services.executor.engine.batch import ScheduledSequence
from scalellm.services.executor.grammar import Masks
from scalellm.v1 import ranks_pb2

_ALL = -1


class TellingMasks(Masks):
    """Rank 0's masks, which are sent to the other ranks with each step that draws with masks.

    Args:
        num_rows: As `Masks` takes it.
        vocab_size: As `Masks` takes it.
        tell: Sends a plan.
    """

    def __init__(self, num_rows: int, vocab_size: int, tell: Callable[[ranks_pb2.RankPlan], None]) -> None:
        super().__init__(num_rows, vocab_size)
        self._tell = tell
        self.is_awaited = False
        """True if the other ranks wait for the masks of a step."""

    def fill(self, scheduled: Sequence[ScheduledSequence]) -> Mapping[int, str]:
        """Compute the masks, and send those of samples that still have a grammar to ranks that wait for them."""
        errors = super().fill(scheduled)
        if self.is_awaited:
            self.is_awaited = False
            places = [place for place, one in enumerate(scheduled) if one.seq.matcher is not None]
            masks = ranks_pb2.RankMasks(places=places, rows=self.rows[places].astype("<i4").tobytes())
            self._tell(ranks_pb2.RankPlan(masks=masks))
        return errors


class ToldMasks(Masks):
    """The masks that rank 0 sent last, on another rank."""

    def __init__(self, num_rows: int, vocab_size: int) -> None:
        super().__init__(num_rows, vocab_size)
        self._told = ranks_pb2.RankMasks()

    def take(self, told: ranks_pb2.RankMasks) -> None:
        """Keep rank 0's masks for the step that is drawn next."""
        self._told = told

    def fill(self, scheduled: Sequence[ScheduledSequence]) -> Mapping[int, str]:
        """Write the received masks. A sample without one has ended on rank 0, and draws without a grammar."""
        places = list(self._told.places)
        for place, one in enumerate(scheduled):
            if place not in places:
                one.seq.matcher = None
        self.rows[: len(scheduled)] = _ALL
        self.rows[places] = np.frombuffer(self._told.rows, "<i4").reshape(len(places), self.rows.shape[1])
        self._told = ranks_pb2.RankMasks()
        return {}
