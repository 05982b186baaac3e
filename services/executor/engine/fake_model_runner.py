"""A model runner without a model: scripted tokens and modelled step times."""

import functools
import time
from collections.abc import Callable, Collection
from types import MappingProxyType

from scalellm.services.executor.engine.batch import (
    CompletedStep,
    Logprobs,
    PendingStep,
    SampledBatch,
    ScheduledBatch,
    ScheduledSequence,
)
from scalellm.services.executor.engine.grammar import StepMasks
from scalellm.services.executor.engine.step_time import StepTimeModel

STEP_TIME_PRESETS = MappingProxyType(
    {
        "instant": StepTimeModel(0.0, 0.0, 0.0, 0.0),
        # Roofline of Llama-3.1-8B in bf16 on one H200 (4.3 TB/s, 790 TFLOP/s): 15 GB of weights per step, 128 KiB of
        # cache per context token; 3.5 ms for one sequence, 5.7 ms for 64 at 1024 tokens, 20 ms for 1024 prefill tokens.
        "h200-llama-8b": StepTimeModel(3.49e-3, 16.2e-6, 2.7e-6, 30.5e-9),
    }
)


class _TimedStep:
    """A step whose tokens are available after some time.

    Args:
        answer: Draws its tokens.
        draws_late: True if the tokens are drawn by `draw` and not at once.
        wait: Waits until the step is complete.
    """

    def __init__(self, answer: Callable[[], SampledBatch], wait: Callable[[], None], *, draws_late: bool) -> None:
        self._answer = answer
        self._wait = wait
        self._sampled = None if draws_late else answer()

    def draw(self) -> None:
        if self._sampled is None:
            self._sampled = self._answer()

    def wait(self) -> SampledBatch:
        self._wait()
        return SampledBatch([]) if self._sampled is None else self._sampled


class FakeModelRunner:
    """Answers every step with scripted tokens after the time that `step_time` gives.

    With `overlaps`, a step begins at its launch or at the end of the previous step, and waiting for it sleeps for the
    remaining time. Without it, `launch` sleeps for the whole time.

    The next token is a function of the previous token and its position alone (`next_token`), never one of
    `special_token_ids`; seeds, penalties, biases and min_tokens change nothing. A sample with a grammar goes on with
    one of the tokens that `masks` allow. Log-probabilities are 0, with the token itself as the only alternative.
    """

    def __init__(
        self,
        vocab_size: int,
        special_token_ids: Collection[int],
        step_time: StepTimeModel,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
        *,
        overlaps: bool = False,
        masks: StepMasks | None = None,
    ) -> None:
        self._ordinary = sorted(set(range(vocab_size)) - set(special_token_ids))
        if not self._ordinary:
            raise ValueError("special_token_ids leave no token to answer with")
        self._step_time = step_time
        self._sleep = sleep
        self._clock = clock
        self._overlaps = overlaps
        self._masks = masks
        self._busy_until = float("-inf")
        self._sampled: dict[int, int] = {}

    @property
    def overlaps(self) -> bool:
        """True if launching returns at once."""
        return self._overlaps

    @property
    def has_equal_rows(self) -> bool:
        """Return True: each token depends on the previous token and its position alone."""
        return True

    def next_token(self, previous: int, position: int) -> int:
        """Return the token at `position` that follows `previous`: a multiplicative hash over the ordinary tokens."""
        return self._ordinary[_mixed(previous, position) % len(self._ordinary)]

    def number(self, previous: int, scheduled: ScheduledSequence) -> int:
        """Return a number from which, modulo the number of allowed tokens, the token after `previous` is chosen."""
        return _mixed(previous, scheduled.position)

    def swap(self, outs: list[tuple[int, int]], ins: list[tuple[int, int]]) -> None:
        """Copy nothing: there is no cache."""

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        """Copy nothing: there is no cache."""

    def check_device(self) -> None:
        """Do nothing: there is no device that could be lost."""

    def launch(self, batch: ScheduledBatch) -> PendingStep:
        """Start a step of the modelled length."""
        seconds = self._step_time.seconds(batch)
        if not self._overlaps:
            if seconds > 0:
                self._sleep(seconds)
            return CompletedStep(self._answer(batch, is_late=False))
        self._busy_until = done_at = max(self._busy_until, self._clock()) + seconds

        def wait() -> None:
            if (left := done_at - self._clock()) > 0:
                self._sleep(left)

        is_late = batch.draws_late
        return _TimedStep(functools.partial(self._answer, batch, is_late=is_late), wait, draws_late=is_late)

    def _answer(self, batch: ScheduledBatch, *, is_late: bool) -> SampledBatch:
        """Draw the tokens. With `is_late` the previous step's tokens are known, and sequences may have ended since."""
        sampled = SampledBatch([])
        drawn = [scheduled for scheduled in batch.sequences if scheduled.samples]
        if self._masks is not None and any(scheduled.seq.matcher is not None for scheduled in drawn):
            sampled.misfits = self._masks.fill(drawn)
        for place, scheduled in enumerate(batch.sequences):
            seq = scheduled.seq
            if scheduled.prompt_logprobs:
                sampled.prompt_logprobs[place] = [
                    Logprobs(0.0, self._top(seq.token_ids[position + 1], seq.group.request.sampling.prompt_logprobs))
                    for position in scheduled.prompt_logprobs
                ]
            if scheduled.samples:
                is_unknown = scheduled.token_pending and not is_late
                last = self._sampled[seq.row] if is_unknown else seq.token_ids[-1]
                if scheduled.draft is not None:
                    last = scheduled.draft
                number = self.number(last, scheduled)
                if self._masks is None or seq.matcher is None:
                    token_id = self._ordinary[number % len(self._ordinary)]
                else:
                    token_id = self._masks.pick(len(sampled.token_ids), number)
                self._sampled[seq.row] = token_id
                wanted = seq.group.request.sampling.logprobs
                if wanted is not None:
                    sampled.logprobs[len(sampled.token_ids)] = Logprobs(0.0, self._top(token_id, wanted))
                sampled.token_ids.append(token_id)
        return sampled

    @staticmethod
    def _top(token_id: int, count: int | None) -> list[tuple[int, float]]:
        return [(token_id, 0.0)] if count else []


def _mixed(previous: int, position: int) -> int:
    mixed = (previous * 2654435761 + position * 2246822519 + 374761393) % 2**32
    return mixed ^ (mixed >> 15)
