"""Batches that nobody joins or leaves: for libraries that compute a batch from its prompts to its longest answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

from bench.peers.servers.stepping import Job, Output

_POLL_S = 0.001


class Batch(Protocol):
    """Sequences that are computed together."""

    def step(self) -> Sequence[int]:
        """The next token of each."""


class ClosedBatches:
    """See Engine. Jobs wait until the batch before them is through.

    Args:
        begin: Makes a batch of these prompts for so many steps at most.
        max_rows: Jobs of a batch.
        eos_token_ids: Tokens that end the answers of jobs that do not ignore it.
        gather_s: A batch is not closed before it is full or so many seconds went by without a job: those that come at
            once shall be computed at once, and the first one of them is here before the others.
        clock: In seconds.
    """

    def __init__(
        self,
        begin: Callable[[Sequence[Sequence[int]], int], Batch],
        max_rows: int,
        eos_token_ids: Collection[int],
        *,
        gather_s: float = 0.01,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._begin = begin
        self._max_rows = max_rows
        self._eos_token_ids = frozenset(eos_token_ids)
        self._gather_s = gather_s
        self._clock = clock
        self._latest = clock()
        self._waiting: dict[int, Job] = {}
        self._batch: Batch | None = None
        self._rows: list[Job] = []
        self._left: dict[int, int] = {}
        """Tokens that the jobs of the batch still want, by number; without those that are over."""

    def add(self, job: Job) -> None:
        """See Engine."""
        self._waiting[job.number] = job
        self._latest = self._clock()

    def cancel(self, number: int) -> None:
        """See Engine. Its row is computed on with the others."""
        self._waiting.pop(number, None)
        self._left.pop(number, None)
        self._end_empty()

    def has_work(self) -> bool:
        """See Engine."""
        return bool(self._waiting or self._left)

    def step(self) -> list[Output]:
        """See Engine."""
        if self._batch is None:
            if len(self._waiting) < self._max_rows and self._clock() - self._latest < self._gather_s:
                time.sleep(_POLL_S)
                return []
            self._rows = list(self._waiting.values())[: self._max_rows]
            self._left = {job.number: job.max_tokens for job in self._rows}
            for number in self._left:
                del self._waiting[number]
            self._batch = self._begin([job.prompt for job in self._rows], max(self._left.values()))
        outputs = [
            self._output(job, token_id)
            for job, token_id in zip(self._rows, self._batch.step(), strict=True)
            if job.number in self._left
        ]
        self._end_empty()
        return outputs

    def _output(self, job: Job, token_id: int) -> Output:
        if not job.ignore_eos and token_id in self._eos_token_ids:
            token_ids, left = [], 0
        else:
            token_ids, left = [token_id], self._left[job.number] - 1
        self._left[job.number] = left
        if not left:
            del self._left[job.number]
        return Output(job.number, token_ids, not left)

    def _end_empty(self) -> None:
        if not self._left:
            self._batch = None
