"""The end of a finished request: its usage, metrics, session turn and last event."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from scalellm.services.common.api_keys import Tenant
from scalellm.services.tokenizer.generation.answer_shape import splits
from scalellm.services.tokenizer.generation.edge import Edge
from scalellm.services.tokenizer.latency import LatencyTrace
from scalellm.services.tokenizer.message import Message
from scalellm.services.tokenizer.metrics import EdgeMetrics
from scalellm.services.tokenizer.model_metrics import ModelMetrics
from scalellm.services.tokenizer.prompt_builder import Prompt
from scalellm.services.tokenizer.sample_stream import SampleStream
from scalellm.services.tokenizer.session import Session
from scalellm.services.tokenizer.session_store import SaveOutcome
from scalellm.services.tokenizer.text.conversation import answer_segment
from scalellm.v1 import common_pb2, generation_pb2, link_pb2

_SESSION_OUTCOMES = {
    SaveOutcome.SAVED: generation_pb2.SESSION_OUTCOME_SAVED,
    SaveOutcome.CONFLICT: generation_pb2.SESSION_OUTCOME_CONFLICT,
    SaveOutcome.UNAVAILABLE: generation_pb2.SESSION_OUTCOME_UNAVAILABLE,
    SaveOutcome.FULL: generation_pb2.SESSION_OUTCOME_FULL,
}


def count_shown(metrics: EdgeMetrics, usage: common_pb2.Usage, num_shown: int, samples: Sequence[SampleStream]) -> None:
    """Set the usage to the tokens that were shown, once all samples have ended.

    The executor generates more tokens until it is told that a stop text was found, and their number depends on timing.
    """
    metrics.tokens_beyond_stop.inc(max(0, usage.completion_tokens - num_shown))
    usage.completion_tokens = num_shown
    counts = [count for sample in samples if (count := sample.num_reasoning_tokens) is not None]
    if counts:
        usage.reasoning_tokens = sum(counts)


async def save_turn(
    edge: Edge,
    tenant: Tenant,
    request: generation_pb2.GenerateRequest,
    session: Session,
    prompt: Prompt,
    sample: SampleStream,
    version: str = "",
) -> generation_pb2.SessionOutcome:
    """Store the turn of a session: question and answer.

    Args:
        edge: The worker.
        tenant: The tenant of the session.
        request: The question.
        session: As it was before.
        prompt: The prompt.
        sample: The answer.
        version: Version of the session after this turn; empty = a new one. Storing the same version again changes
            nothing.
    """
    assert prompt.continuation is not None
    text, writing = "".join(sample.answer_text), edge.prompts.writing
    answer = Message.answer(sample.answer_parts) if splits(request) else Message("assistant", text)
    texts = (writing.marked_texts if splits(request) else writing.texts).after(prompt.token_ids)
    written = answer_segment(texts, sample.answer_ids, text)
    new_messages = list(map(Message.of_wire, request.chat.messages))
    extended = session.add_turn(new_messages, prompt.continuation, written, answer)
    extended = dataclasses.replace(extended, model=edge.model_name)
    return _SESSION_OUTCOMES[await edge.sessions.of(tenant).save(request.session_id, extended, version)]


def make_finished(
    metrics: ModelMetrics,
    trace: LatencyTrace,
    finish: link_pb2.Finish,
    samples: Sequence[generation_pb2.SampleFinished],
    outcome: generation_pb2.SessionOutcome | None,
) -> generation_pb2.Finished:
    """Count a request that finished, and return its last event.

    Args:
        metrics: Metrics of its model.
        trace: The request's times.
        finish: The scheduler's Finish.
        samples: Ends of the samples.
        outcome: Outcome of its session; None without one.
    """
    for sample in samples:
        if (counter := metrics.success.get(sample.reason)) is not None:
            counter.inc()
    latency = trace.breakdown(finish.timings)
    following = finish.usage.completion_tokens / max(1, len(samples)) - 1
    seconds = (trace.last_token_at - trace.first_token_at) / 1e9 / following if following > 0 else 0.0
    metrics.observe_finished(latency, finish.usage, seconds)
    return generation_pb2.Finished(samples=samples, usage=finish.usage, latency=latency, session=outcome)
