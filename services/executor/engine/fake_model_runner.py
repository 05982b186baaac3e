"""A model runner without a model: scripted tokens and the step times of a device that is not there."""

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from types import MappingProxyType

from services.executor.engine.batch import CompletedStep, Logprobs, PendingStep, SampledBatch, ScheduledBatch


@dataclass(frozen=True, slots=True)
class StepTimeModel:
    """Seconds of a step: base, plus per prefill token, per decoding sequence, and per token of decode context."""

    base: float
    per_prefill_token: float
    per_decode: float
    per_context_token: float

    def seconds(self, batch: ScheduledBatch) -> float:
        """Return how long the step takes."""
        context = sum(s.start + 1 for s in batch.sequences[: batch.num_decodes])
        return (
            self.base
            + self.per_prefill_token * batch.num_prefill_tokens
            + self.per_decode * batch.num_decodes
            + self.per_context_token * context
        )


STEP_TIME_PRESETS = MappingProxyType(
    {
        "instant": StepTimeModel(0.0, 0.0, 0.0, 0.0),
        # Roofline of Llama-3.1-8B in bf16 on one H200 (4.3 TB/s, 790 TFLOP/s): 15 GB of weights per step, 128 KiB of
        # cache per context token; 3.5 ms for one sequence, 5.7 ms for 64 at 1024 tokens, 20 ms for 1024 prefill tokens.
        "h200-llama-8b": StepTimeModel(3.49e-3, 16.2e-6, 2.7e-6, 30.5e-9),
    }
)


@dataclass(frozen=True, slots=True)
class _TimedStep:
    sampled: SampledBatch
    done_at: float
    sleep: Callable[[float], None]
    clock: Callable[[], float]

    def draw(self) -> None:
        """Nothing: the tokens are known."""

    def wait(self) -> SampledBatch:
        left = self.done_at - self.clock()
        if left > 0:
            self.sleep(left)
        return self.sampled


class FakeModelRunner:
    """Answers every step with scripted tokens after the time that `step_time` gives.

    With `overlaps` that time passes from the launch on, or from the end of the step before, and waiting lasts for what
    is left of it; without, launching sleeps through it.

    The next token is a function of the previous token and its position alone (`next_token`), never one of
    `special_token_ids`; seeds, penalties, biases and min_tokens change nothing. Log-probabilities are 0, with the
    token itself as the only alternative.
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
    ) -> None:
        self._ordinary = sorted(set(range(vocab_size)) - set(special_token_ids))
        if not self._ordinary:
            raise ValueError("special_token_ids leave no token to answer with")
        self._step_time = step_time
        self._sleep = sleep
        self._clock = clock
        self._overlaps = overlaps
        self._busy_until = float("-inf")
        self._sampled: dict[int, int] = {}

    @property
    def overlaps(self) -> bool:
        """Whether launching returns at once."""
        return self._overlaps

    def next_token(self, previous: int, position: int) -> int:
        """Return the token at `position` that follows `previous`: a multiplicative hash over the ordinary tokens."""
        mixed = (previous * 2654435761 + position * 2246822519 + 374761393) % 2**32
        return self._ordinary[(mixed ^ (mixed >> 15)) % len(self._ordinary)]

    def swap(self, outs: list[tuple[int, int]], ins: list[tuple[int, int]]) -> None:
        """Copy nothing: there is no cache."""

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        """Copy nothing: there is no cache."""

    def check_device(self) -> None:
        """There is no device that could be lost."""

    def launch(self, batch: ScheduledBatch) -> PendingStep:
        """Start a step of the modelled length."""
        seconds = self._step_time.seconds(batch)
        if not self._overlaps:
            if seconds > 0:
                self._sleep(seconds)
            return CompletedStep(self._answer(batch))
        self._busy_until = max(self._busy_until, self._clock()) + seconds
        return _TimedStep(self._answer(batch), self._busy_until, self._sleep, self._clock)

    def _answer(self, batch: ScheduledBatch) -> SampledBatch:
        sampled = SampledBatch([])
        for place, scheduled in enumerate(batch.sequences):
            seq = scheduled.seq
            if scheduled.prompt_logprobs:
                sampled.prompt_logprobs[place] = [
                    Logprobs(0.0, self._top(seq.token_ids[position + 1], seq.group.request.sampling.prompt_logprobs))
                    for position in scheduled.prompt_logprobs
                ]
            if scheduled.samples:
                last = self._sampled[seq.row] if scheduled.token_pending else seq.token_ids[-1]
                token_id = self._sampled[seq.row] = self.next_token(last, scheduled.position)
                wanted = seq.group.request.sampling.logprobs
                if wanted is not None:
                    sampled.logprobs[len(sampled.token_ids)] = Logprobs(0.0, self._top(token_id, wanted))
                sampled.token_ids.append(token_id)
        return sampled

    @staticmethod
    def _top(token_id: int, count: int | None) -> list[tuple[int, float]]:
        return [(token_id, 0.0)] if count else []
