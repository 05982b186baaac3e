"""The edge's spans of one request that is traced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import grpc

from scalellm.services.common.logs import RequestFields
from scalellm.services.common.tracing import TraceHeaders
from scalellm.services.tokenizer.generation.caller import Caller
from scalellm.services.tokenizer.latency import LatencyTrace
from scalellm.services.tokenizer.request_log import RequestEnd
from scalellm.v1 import common_pb2, generation_pb2, link_pb2

if TYPE_CHECKING:
    from scalellm.services.common.tracing.tracer import Attributes, Span, Tracer

_LINK = "scalellm.v1.Scheduler/Connect"

_SAMPLING = (
    ("max_tokens", "gen_ai.request.max_tokens"),
    ("temperature", "gen_ai.request.temperature"),
    ("top_p", "gen_ai.request.top_p"),
    ("top_k", "gen_ai.request.top_k"),
    ("presence_penalty", "gen_ai.request.presence_penalty"),
    ("frequency_penalty", "gen_ai.request.frequency_penalty"),
)


class RequestTrace:
    """One span for the call, and under it one for each stage: session, tokenize, the scheduler's part, detokenize.

    Names of attributes follow OpenTelemetry's conventions for generative AI, with `scalellm.` for our own. Attributes
    never contain users' texts.

    Args:
        span: Span of the call.
        times: Times of the stages.
    """

    def __init__(self, span: Span, times: LatencyTrace) -> None:
        self._span = span
        self._times = times
        self._below: Span | None = None

    @classmethod
    def begin(cls, tracer: Tracer, caller: Caller, times: LatencyTrace, model: str) -> RequestTrace | None:
        """Begin the trace at the call's arrival. Returns None if the call is not traced."""
        attributes = {**caller.span_attributes, "gen_ai.request.model": model}
        span = tracer.begin(caller.method, caller.trace_headers(), times.arrived_at, attributes=attributes)
        return cls(span, times) if span is not None else None

    @property
    def trace_id(self) -> str:
        """Id of the trace to which the spans belong."""
        return self._span.headers.trace_id

    def submit(self) -> TraceHeaders:
        """Begin the span of the scheduler's part. Returns the trace headers for the Submit."""
        self._below = self._span.begin(_LINK, self._times.now(), kind="client")
        return self._below.headers

    def end(
        self,
        end: RequestEnd,
        fields: RequestFields,
        finish: link_pb2.Finish | None,
        samples: Sequence[generation_pb2.SampleFinished],
    ) -> None:
        """End all spans with the call.

        Args:
            end: End of the request.
            fields: Its tenant, and its id as far as it had one.
            finish: The scheduler's Finish; None when it did not get that far.
            samples: Ends of its samples.
        """
        times, span = self._times, self._span
        now = times.now()
        message = end.error.message if end.error is not None else ""
        # The message may quote what the client sent.
        message = message if end.code is not grpc.StatusCode.INVALID_ARGUMENT else ""
        if times.session_at:
            span.add("session", times.session_at, times.session_at + times.session_ns if times.session_ns else now)
        if times.tokenize_at:
            span.add("tokenize", times.tokenize_at, times.tokenize_at + times.tokenize_ns if times.tokenize_ns else now)
        if self._below is not None:
            for again in times.resubmissions:
                attributes: Attributes = {
                    "server.address": again.address,
                    "scalellm.attempt": again.attempt,
                    "scalellm.reason": again.reason,
                }
                self._below.event("resubmitted", again.at, attributes)
            span.set({"scalellm.resubmissions": len(times.resubmissions)})
            finished = times.finished_at or now
            self._below.end(finished, end.code if finish is None else _code(finish), message)
            if times.finished_at and times.first_token_at:
                cpu_ms = times.detokenize_cpu_ns / 1e6
                span.add("detokenize", finished, now, {"scalellm.detokenize.cpu_ms": cpu_ms})
        if times.first_token_at:
            span.event("first token", times.first_token_at)
        span.set(self._attributes(end, fields, samples))
        span.end(now, end.code, message)

    def _attributes(
        self, end: RequestEnd, fields: RequestFields, samples: Sequence[generation_pb2.SampleFinished]
    ) -> Attributes:
        request, usage, latency = end.request, end.usage, end.latency
        sampling = request.sampling
        is_chat = request.WhichOneof("input") == "chat"
        values: dict[str, str | int | float | Sequence[str]] = {
            "gen_ai.operation.name": "chat" if is_chat else "text_completion",
            "gen_ai.provider.name": "scalellm",
            "gen_ai.request.stream": True,
        }
        values |= {name: getattr(sampling, field) for field, name in _SAMPLING if sampling.HasField(field)}
        if fields.tenant:
            values["scalellm.tenant"] = fields.tenant
        if fields.request_id:
            values["gen_ai.response.id"] = fields.request_id
        if sampling.n > 1:
            values["gen_ai.request.choice.count"] = sampling.n
        if fields.request_id and request.session_id:  # both were found to be well-formed
            values["gen_ai.conversation.id"] = request.session_id
        if usage is not None:
            values["gen_ai.usage.input_tokens"] = usage.prompt_tokens
            values["gen_ai.usage.output_tokens"] = usage.completion_tokens
            values["gen_ai.usage.cache_read.input_tokens"] = usage.cached_tokens
            values["scalellm.preemptions"] = usage.num_preemptions
        if latency.ttft_ns:
            values["gen_ai.response.time_to_first_chunk"] = latency.ttft_ns / 1e9
        if latency.executor_id:
            values["scalellm.executor"] = latency.executor_id
        if samples:
            values["gen_ai.response.finish_reasons"] = [_reason(sample.reason) for sample in samples]
        return values


def _reason(reason: common_pb2.FinishReason) -> str:
    return common_pb2.FinishReason.Name(reason).removeprefix("FINISH_REASON_").lower()


def _code(finish: link_pb2.Finish) -> grpc.StatusCode:
    return next((code for code in grpc.StatusCode if code.value[0] == finish.status.code), grpc.StatusCode.UNKNOWN)
