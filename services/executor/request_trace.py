"""Spans of the requests that ran on an engine.

The engine process records the times of a traced request, and the front makes the spans, because an exporter in the
engine process would compete with the step loop for the interpreter lock.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import grpc

from scalellm.services.common.errors import StatusError
from scalellm.services.common.tracing import TraceHeaders
from scalellm.v1 import executor_pb2, link_pb2

if TYPE_CHECKING:
    from scalellm.services.common.tracing.tracer import Tracer


class TracedRequests:
    """Records the traced requests of one link, in the engine process."""

    def __init__(self) -> None:
        self._running: dict[int, executor_pb2.TracedRequest] = {}
        self._ended: list[executor_pb2.TracedRequest] = []

    def on_submit(self, submit: link_pb2.Submit, now: float) -> None:
        """Record a Submit, if it is traced; now: time of arrival, in monotonic seconds."""
        if TraceHeaders(submit.traceparent).is_sampled:
            self._running[submit.handle] = executor_pb2.TracedRequest(
                request_id=submit.request_id,
                traceparent=submit.traceparent,
                tracestate=submit.tracestate,
                submitted_at_ns=int(now * 1e9),
            )

    def on_finish(self, finishes: Iterable[link_pb2.Finish]) -> None:
        """Record the ends of requests. Those that are not traced are ignored."""
        for finish in finishes:
            if (request := self._running.pop(finish.handle, None)) is not None:
                request.finish.CopyFrom(finish)
                self._ended.append(request)

    def on_drop(self, now: float) -> None:
        """Record the end of all the link's requests, since the link was closed."""
        status = StatusError(grpc.StatusCode.CANCELLED, "the link was dropped").to_link()
        finishes = []
        for handle, request in self._running.items():
            total = max(0, int(now * 1e9) - request.submitted_at_ns)
            timings = link_pb2.HopTimings(executor_total_ns=total)
            finishes.append(link_pb2.Finish(handle=handle, status=status, timings=timings))
        self.on_finish(finishes)

    def take(self) -> list[executor_pb2.TracedRequest]:
        """Return the requests that have ended since the last call."""
        ended, self._ended = self._ended, []
        return ended


def record(tracer: Tracer, request: executor_pb2.TracedRequest) -> None:
    """Make the spans of a request, in the front: one for the whole, and one for each of its consecutive stages."""
    headers = TraceHeaders(request.traceparent, request.tracestate)
    start, finish = request.submitted_at_ns, request.finish
    usage, timings = finish.usage, finish.timings
    span = tracer.begin("execute", headers, start, attributes={"gen_ai.response.id": request.request_id})
    if span is None:
        return
    now = start
    for name, duration in (("queue", timings.queue_ns), ("prefill", timings.prefill_ns), ("decode", timings.decode_ns)):
        if duration:
            span.add(name, now, now + duration)
            now += duration
    span.set(
        {
            "gen_ai.usage.input_tokens": usage.prompt_tokens,
            "gen_ai.usage.output_tokens": usage.completion_tokens,
            "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens,
            "scalellm.preemptions": usage.num_preemptions,
            "scalellm.preempted_ms": timings.preempted_ns / 1e6,
        }
    )
    code = StatusError.from_link(finish.status).code if finish.status.code else grpc.StatusCode.OK
    span.end(max(now, start + timings.executor_total_ns), code, finish.status.message)
