"""The steps in flight between the engine and the runner, which are launched and waited for in order."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

from scalellm.services.executor.engine.batch import (
    CompletedStep,
    DeviceLostError,
    ModelRunnerProtocol,
    PendingStep,
    SampledBatch,
    ScheduledBatch,
)


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """The end of a step: its samples, or the error that the runner raised.

    finished_at: time at which the host had the results. seconds: time on the device, without the time that the step
    was queued behind the previous one.
    """

    batch: ScheduledBatch
    sampled: SampledBatch | Exception
    finished_at: float
    seconds: float


@dataclass(frozen=True, slots=True)
class _LaunchedStep:
    batch: ScheduledBatch
    pending: PendingStep | Exception
    launched_at: float


class Pipeline:
    """The steps in flight. At most one stays in flight between two calls of the engine.

    With a runner that overlaps, step N+1 is scheduled and launched before step N is waited for (vLLM's asynchronous
    scheduling, SGLang's overlap scheduler): the device never waits for the host, whose work takes as long as a decode
    step of a small model. With a runner that does not overlap, a step launched ahead gains nothing, and wastes a row
    whenever a sample stops.
    """

    def __init__(self, runner: ModelRunnerProtocol, clock: Callable[[], float]) -> None:
        self._runner = runner
        self._clock = clock
        self._steps: deque[_LaunchedStep] = deque()
        self._idle_since = float("-inf")

    def __len__(self) -> int:
        return len(self._steps)

    def discard(self) -> list[ScheduledBatch]:
        """Wait for the steps in flight, drop their results, and return their batches."""
        return [self.wait().batch for _ in range(len(self._steps))]

    @property
    def withholds_tokens(self) -> bool:
        """True if a step in flight samples tokens that must be known before the next step can be launched."""
        return any(
            scheduled.samples and scheduled.seq.group.needs_known_tokens
            for step in self._steps
            for scheduled in step.batch.sequences
        )

    @property
    def takes_drafts(self) -> bool:
        """True if a step may have rows for drafts: the runner does not overlap, so that all tokens are known before the
        launch, and the results of a row do not depend on the other rows.
        """
        return not self._runner.overlaps and self._runner.has_equal_rows

    def launch(self, batch: ScheduledBatch, now: float) -> bool:
        """Launch a step that was begun at `now`. Returns whether it may stay in flight. An exception becomes its
        outcome.
        """
        pending: PendingStep | Exception
        try:
            if batch.has_swaps:
                self._runner.swap(batch.swap_outs, batch.swap_ins)
            if batch.block_copies:
                self._runner.copy_blocks(batch.block_copies)
            pending = self._runner.launch(batch) if batch.sequences else CompletedStep(SampledBatch([]))
        except Exception as error:
            pending = error
        self._steps.append(_LaunchedStep(batch, pending, now))
        return self._runner.overlaps and not isinstance(pending, Exception)

    def draw(self) -> None:
        """Let the last step draw its tokens, if it postponed that until the tokens of all earlier steps are known."""
        step = self._steps[-1] if self._steps else None
        if step is None or isinstance(step.pending, Exception):
            return
        try:
            step.pending.draw()
        except Exception as error:
            self._steps[-1] = replace(step, pending=error)

    def wait(self) -> StepOutcome:
        """Wait for the first step in flight. Raises DeviceLostError if it failed and no other one can succeed."""
        step = self._steps.popleft()
        sampled: SampledBatch | Exception
        if isinstance(step.pending, Exception):
            sampled = step.pending
        else:
            try:
                sampled = step.pending.wait()
            except Exception as error:
                sampled = error
        if isinstance(sampled, Exception):
            self._check_device(sampled)
        now = self._clock()
        seconds = now - max(step.launched_at, self._idle_since)
        self._idle_since = now
        return StepOutcome(step.batch, sampled, now, seconds)

    def _check_device(self, error: Exception) -> None:
        """Raise DeviceLostError if a step failed because the device is lost, so that every later step would
        fail too.
        """
        try:
            self._runner.check_device()
        except Exception as lost:
            raise DeviceLostError(f"{type(lost).__name__}: {lost}") from error
