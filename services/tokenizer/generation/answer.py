"""A request's answer: makes the events that its client sees from the tokens that its receiver holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from scalellm.services.tokenizer.dialect.splitter import AnswerSplitter
from scalellm.services.tokenizer.generation.answer_shape import make_counters, make_splitters, splits
from scalellm.services.tokenizer.latency import LatencyTrace
from scalellm.services.tokenizer.model_metrics import ModelMetrics
from scalellm.services.tokenizer.reasoning_tokens import ReasoningTokens
from scalellm.services.tokenizer.sample_stream import Delta, OutputOptions, SampleStream
from scalellm.services.tokenizer.text.stop_strings import StopStrings
from scalellm.services.tokenizer.token_receiver import TokenBatch
from scalellm.services.tokenizer.writing import Writing
from scalellm.v1 import common_pb2, generation_pb2, link_pb2

Event = generation_pb2.Started | generation_pb2.PromptLogprobs | Delta | generation_pb2.Finished
"""An event of a request. First Started, last Finished; log-probabilities of the prompt come before any Delta."""


def make_samples(
    request: generation_pb2.GenerateRequest, options: OutputOptions, submit: link_pb2.Submit, writing: Writing
) -> list[SampleStream]:
    """Make the streams of a request's samples, at their beginning.

    Args:
        request: The client's request.
        options: The wanted parts of the answer.
        submit: The Submit made of it.
        writing: The model's way of writing.
    """
    stops = StopStrings(request.stop) if request.stop else None
    none = [None] * submit.sampling.n
    splitters: Sequence[AnswerSplitter | None] = make_splitters(request, submit, writing) or none
    counters: Sequence[ReasoningTokens | None] = make_counters(request, submit, writing) or none
    texts = (writing.marked_texts if splits(request) else writing.texts).after(submit.token_ids)
    return [
        SampleStream(index, options, texts, stops, *read_by)
        for index, read_by in enumerate(zip(splitters, counters, strict=True))
    ]


class TokenSource(Protocol):
    """A source of tokens: a TokenReceiver, or a TranscriptReader."""

    @property
    def first_token_at(self) -> int:
        """The time of the first token."""

    def take_prompt_logprobs(self) -> list[tuple[int, common_pb2.TokenLogprobs]]:
        """See TokenReceiver."""

    def take(self) -> list[TokenBatch]:
        """See TokenReceiver."""


@dataclass(slots=True)
class Answer:
    """The samples of one request while they grow.

    Attributes:
        prompt_ids: Token ids of the prompt.
        samples: Samples by index.
        trace: Receives the time of detokenising and of the first token.
        metrics: Receives the times between messages.
        stop_sample: Called with the index of a sample that a stop text ended.
        seen: Number of tokens of each sample that the client has already; they are in no Delta.
        by_token: True to make a Delta of each token, so that Deltas are the same whenever the answer is read.
    """

    prompt_ids: Sequence[int]
    samples: Sequence[SampleStream]
    trace: LatencyTrace
    metrics: ModelMetrics
    stop_sample: Callable[[int], None]
    seen: Sequence[int] = ()
    by_token: bool = False
    _sent_at: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self._sent_at = [0] * len(self.samples)

    @property
    def num_tokens(self) -> int:
        """Number of tokens sent to the client, over all samples."""
        return sum(sample.num_tokens for sample in self.samples)

    @property
    def ended_samples(self) -> list[generation_pb2.SampleFinished]:
        """The ends of the samples that have ended."""
        return [sample.ended for sample in self.samples if sample.ended is not None]

    def take(self, receiver: TokenSource) -> list[generation_pb2.PromptLogprobs | Delta]:
        """Return the events for the tokens that have arrived and are due. Raises StatusError if the request is lost."""
        events: list[generation_pb2.PromptLogprobs | Delta] = []
        trace, metrics, sent_at = self.trace, self.metrics, self._sent_at
        while parts := receiver.take_prompt_logprobs():
            for offset, logprobs in parts:
                token_ids = self.prompt_ids[offset : offset + len(logprobs.logprobs)]
                events.append(generation_pb2.PromptLogprobs(token_ids=token_ids, logprobs=logprobs, offset=offset))
        batches = receiver.take()
        if self.by_token:
            batches = [part for batch in batches for part in batch.parts(1)]
        for batch in batches:
            index = batch.index
            sample = self.samples[index]
            had_ended = sample.ended is not None
            started = trace.now()
            delta = sample.push(batch)
            now = trace.now()
            trace.detokenize_cpu_ns += now - started
            if sample.ended is not None and batch.finish is None and not had_ended:
                self.stop_sample(index)
            if delta is None:
                continue
            if self.seen and delta.num_tokens and delta.offset + delta.num_tokens <= self.seen[index]:
                continue
            if sent_at[index]:
                metrics.observe_gap((now - sent_at[index]) / 1e9)
            elif not trace.first_token_at:
                trace.first_token_at = receiver.first_token_at
                metrics.ttft.observe(trace.ttft_seconds)  # once per request
            sent_at[index] = now
            events.append(delta)
        return events
