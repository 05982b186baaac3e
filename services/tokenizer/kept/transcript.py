"""The results of one request so far, which any number of readers can read from any position."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from scalellm.services.common.errors import StatusError
from scalellm.services.common.link import add_tokens, copy_logprobs, token_runs
from scalellm.services.tokenizer.limits import MAX_ANSWER_TOKENS
from scalellm.services.tokenizer.token_receiver import TokenBatch
from scalellm.v1 import common_pb2, generation_pb2, link_pb2


@dataclass(slots=True)
class SampleLog:
    """The results of one sample.

    Attributes:
        token_ids: Its tokens; if a stop text ended it, those up to the stop text.
        logprobs: One entry per token, if requested.
        finish: Its end; FINISH_REASON_STOP without a token if a stop text ended it.
    """

    token_ids: array[int] = field(default_factory=lambda: array("I"))
    logprobs: common_pb2.TokenLogprobs = field(default_factory=common_pb2.TokenLogprobs)
    finish: link_pb2.LinkSampleFinish | None = None


@dataclass(slots=True)
class Mark:
    """A position in a transcript: the numbers of tokens and the ends of the samples, and of prompt
    log-probabilities.
    """

    num_tokens: list[int]
    has_finish: list[bool]
    num_prompt: int = 0


class Transcript:
    """The results of one request.

    Args:
        submit: The request: its prompt, how many samples, and which log-probabilities were asked for.

    Attributes:
        samples: Samples by index.
        prompt_logprobs: Log-probabilities of the first tokens of the prompt.
        finished: The last event, if the request has finished with OK.
        error: The status, if it has ended otherwise.
        first_token_at: Time at which its first token arrived here, in nanoseconds of the monotonic clock; 0 = not yet.
    """

    def __init__(self, submit: link_pb2.Submit) -> None:
        sampling = submit.sampling
        self.samples = [SampleLog() for _ in range(sampling.n)]
        self.prompt_logprobs = common_pb2.TokenLogprobs()
        self.finished: generation_pb2.Finished | None = None
        self.error: link_pb2.LinkStatus | None = None
        self.first_token_at = 0
        self._has_logprobs = sampling.HasField("logprobs")
        self._num_prompt = len(submit.token_ids) if sampling.HasField("prompt_logprobs") else 0
        self._readers: set[TranscriptReader] = set()

    @property
    def is_over(self) -> bool:
        """True once the request has ended, so that nothing more is added."""
        return self.finished is not None or self.error is not None

    @property
    def has_all(self) -> bool:
        """True if every sample has ended."""
        return all(sample.finish is not None for sample in self.samples)

    @property
    def num_tokens(self) -> int:
        """Tokens of all samples."""
        return sum(len(sample.token_ids) for sample in self.samples)

    def add(self, batch: TokenBatch) -> None:
        """Add tokens of a sample, which must follow those that are here."""
        sample = self.samples[batch.index]
        sample.token_ids.extend(batch.token_ids)
        if self._has_logprobs and batch.logprobs is not None:
            _append(sample.logprobs, batch.logprobs, 0)
        sample.finish = sample.finish or batch.finish
        self._wake()

    def add_prompt_logprobs(self, offset: int, values: common_pb2.TokenLogprobs) -> None:
        """Add log-probabilities of the prompt from token `offset` on. Those that are here already are skipped."""
        _append(self.prompt_logprobs, values, len(self.prompt_logprobs.logprobs) - offset)
        self._wake()

    def apply(self, step: link_pb2.StepOutput) -> None:
        """Add results from a journal. Those that are here already are skipped. Raises ValueError if some are
        missing.
        """
        for entry in step.prompt_logprobs:
            self.add_prompt_logprobs(entry.offset, entry.values)
        logprobs = {(entry.index, entry.offset): entry.values for entry in step.logprobs}
        for _, index, offset, token_ids in token_runs(step):
            sample = self.samples[index]
            known = len(sample.token_ids) - offset
            if known < 0:
                raise ValueError(f"tokens {len(sample.token_ids)} to {offset - 1} of sample {index} are missing")
            sample.token_ids.extend(token_ids[known:])
            if (values := logprobs.get((index, offset))) is not None:
                _append(sample.logprobs, values, len(sample.logprobs.logprobs) - offset)
        for finish in step.finished_samples:
            self.samples[finish.index].finish = finish
        self._wake()

    def begin(self) -> Mark:
        """Return the mark of an empty transcript."""
        return Mark([0] * len(self.samples), [False] * len(self.samples))

    @property
    def mark(self) -> Mark:
        """The mark of its end."""
        num_tokens = [len(sample.token_ids) for sample in self.samples]
        return Mark(
            num_tokens, [sample.finish is not None for sample in self.samples], len(self.prompt_logprobs.logprobs)
        )

    def since(self, mark: Mark, most: int = MAX_ANSWER_TOKENS) -> tuple[link_pb2.StepOutput, Mark]:
        """Return the next results after a mark, with handles of 0, and the mark behind them, from which to go on.

        Args:
            mark: The mark.
            most: Most tokens of the prompt, and of all samples.
        """
        step = link_pb2.StepOutput()
        num_prompt = min(len(self.prompt_logprobs.logprobs), mark.num_prompt + most)
        if num_prompt > mark.num_prompt:
            entry = step.prompt_logprobs.add(offset=mark.num_prompt)
            entry.values.CopyFrom(copy_logprobs(self.prompt_logprobs, mark.num_prompt, num_prompt))
        if num_prompt < len(self.prompt_logprobs.logprobs):  # readers need all of these before the first token
            return step, Mark(mark.num_tokens, mark.has_finish, num_prompt)
        after = Mark([], [], num_prompt)
        for index, sample in enumerate(self.samples):
            offset = mark.num_tokens[index]
            num_tokens = min(len(sample.token_ids), offset + most)
            most -= num_tokens - offset
            if num_tokens > offset:
                add_tokens(step, 0, index, offset, sample.token_ids[offset:num_tokens])
                if self._has_logprobs:
                    logprobs = step.logprobs.add(index=index, offset=offset)
                    logprobs.values.CopyFrom(copy_logprobs(sample.logprobs, offset, num_tokens))
            has_finish = sample.finish is not None and num_tokens == len(sample.token_ids)
            if sample.finish is not None and has_finish and not mark.has_finish[index]:
                step.finished_samples.add(
                    index=index,
                    reason=sample.finish.reason,
                    stop_token_id=sample.finish.stop_token_id if sample.finish.HasField("stop_token_id") else None,
                )
            after.num_tokens.append(num_tokens)
            after.has_finish.append(has_finish)
        return step, after

    def resume(self, submit: link_pb2.Submit) -> None:
        """Set `resumed` of a copy of the first Submit, so that it continues from the transcript's end."""
        for index, sample in enumerate(self.samples):
            if sample.token_ids or sample.finish is not None:
                reason = sample.finish.reason if sample.finish is not None else common_pb2.FINISH_REASON_UNSPECIFIED
                submit.resumed.add(index=index, token_ids=sample.token_ids, finished=reason)
        if self._num_prompt and len(self.prompt_logprobs.logprobs) >= self._num_prompt:
            submit.sampling.ClearField("prompt_logprobs")

    def end(self, finished: generation_pb2.Finished | link_pb2.LinkStatus) -> None:
        """Record the end of the request."""
        if isinstance(finished, generation_pb2.Finished):
            self.finished = finished
        else:
            self.error = finished
        self._wake()

    @contextmanager
    def reader(self, offsets: Sequence[int], min_tokens: int, *, repeats: bool = False) -> Iterator[TranscriptReader]:
        """Context of a reader, which reads the results that are here and those that will be added.

        Args:
            offsets: Number of tokens of each sample that the reader has seen. They are read again, in separate batches.
            min_tokens: Tokens of a sample to wait for, beside the first and the last ones.
            repeats: True to read the log-probabilities of the prompt again, too.
        """
        reader = TranscriptReader(self, offsets, min_tokens, wants_prompt=repeats or not any(offsets))
        self._readers.add(reader)
        try:
            yield reader
        finally:
            self._readers.discard(reader)

    def _wake(self) -> None:
        for reader in self._readers:
            reader.changed.set()


class TranscriptReader:
    """One reader of a transcript, made by `Transcript.reader`. A TokenSource for `Answer.take`.

    Attributes:
        changed: Set when there may be more to read.
    """

    def __init__(self, transcript: Transcript, offsets: Sequence[int], min_tokens: int, *, wants_prompt: bool) -> None:
        self.changed = asyncio.Event()
        self.changed.set()
        self._transcript = transcript
        self._borders = offsets
        self._min_tokens = min_tokens
        self._read = transcript.begin()
        self._wants_prompt = wants_prompt

    @property
    def first_token_at(self) -> int:
        """The time at which the request's first token came here, in nanoseconds of the monotonic clock."""
        return self._transcript.first_token_at

    async def wait(self) -> None:
        """Wait until there may be more to take."""
        await self.changed.wait()
        self.changed.clear()

    def take_prompt_logprobs(self) -> list[tuple[int, common_pb2.TokenLogprobs]]:
        """See TokenReceiver."""
        values, start = self._transcript.prompt_logprobs, self._read.num_prompt
        if not self._wants_prompt or start >= len(values.logprobs):
            return []
        self._read.num_prompt = stop = min(start + MAX_ANSWER_TOKENS, len(values.logprobs))
        return [(start, copy_logprobs(values, start, stop))]

    def take(self) -> list[TokenBatch]:
        """Return the batches that are due."""
        batches: list[TokenBatch] = []
        read, is_over = self._read, self._transcript.is_over
        for index, sample in enumerate(self._transcript.samples):
            start, stop, border = read.num_tokens[index], len(sample.token_ids), self._borders[index]
            if start < border < stop:
                stop = border
                self.changed.set()  # more batches remain
            is_last = sample.finish is not None and stop == len(sample.token_ids) and not read.has_finish[index]
            is_due = stop - start >= self._min_tokens or start == 0 or start < border or is_over
            if not is_last and (start == stop or not is_due):
                continue
            logprobs = copy_logprobs(sample.logprobs, start, stop) if sample.logprobs.logprobs else None
            finish = sample.finish if is_last else None
            batches += TokenBatch(index, sample.token_ids[start:stop].tolist(), logprobs, finish).parts()
            read.num_tokens[index], read.has_finish[index] = stop, is_last
        return batches

    def raise_error(self) -> None:
        """Raise StatusError if the request ended with one and all results before that were taken."""
        if self._transcript.error is not None:
            raise StatusError.from_link(self._transcript.error)


def _append(target: common_pb2.TokenLogprobs, values: common_pb2.TokenLogprobs, skip: int) -> None:
    new = copy_logprobs(values, max(0, skip), len(values.logprobs))
    target.num_top = values.num_top
    target.logprobs.extend(new.logprobs)
    target.top_token_ids.extend(new.top_token_ids)
    target.top_logprobs.extend(new.top_logprobs)
