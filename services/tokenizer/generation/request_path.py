"""One request's way through the edge: from what a client asks to the events that it is told."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator
from types import TracebackType
from typing import Self

import grpc

from scalellm.v1 import common_pb2, generation_pb2, link_pb2
from services.common.api_keys import DEFAULT_TENANT
from services.common.errors import StatusError
from services.common.link import LONGEST_NS
from services.common.logs import RequestFields, request_fields
from services.tokenizer.generation.answer import Answer, Event, make_samples
from services.tokenizer.generation.caller import Caller
from services.tokenizer.generation.edge import Edge, cache_salt
from services.tokenizer.latency import LatencyTrace, server_timing
from services.tokenizer.prompt_builder import Prompt
from services.tokenizer.quotas import Lease
from services.tokenizer.request_log import RequestEnd
from services.tokenizer.request_trace import RequestTrace
from services.tokenizer.sample_stream import SampleStream
from services.tokenizer.session import Session, new_session
from services.tokenizer.session_store import SaveOutcome
from services.tokenizer.text.conversation import answer_segment
from services.tokenizer.token_receiver import TokenReceiver
from services.tokenizer.validation import MIN_PRIORITY, check_prompt_tokens, fit_context, is_id, validate_generate

_LINK_WAIT = 1.5
"""Seconds a new request waits for the link to come (back): a scheduler that restarts is not an error to its clients."""

_ACCEPTANCE = 0.05
"""Seconds given to the scheduler to refuse a request before Started says that it was accepted. A refusal before the
first message leaves gRPC's own retry policies free to act."""

# Every JSON and JavaScript client keeps integers below 2^53 as they are.
_SEED_BITS = 53

_SESSION_OUTCOMES = {
    SaveOutcome.SAVED: generation_pb2.SESSION_OUTCOME_SAVED,
    SaveOutcome.CONFLICT: generation_pb2.SESSION_OUTCOME_CONFLICT,
    SaveOutcome.UNAVAILABLE: generation_pb2.SESSION_OUTCOME_UNAVAILABLE,
    SaveOutcome.FULL: generation_pb2.SESSION_OUTCOME_FULL,
}


class Generation:
    """One request, from its arrival to the moment when its answer was written.

    Every protocol serves it alike:

        generation = Generation(edge, request, caller)
        try:
            async with generation:
                async for event in generation.events:
                    ...  # write it, and wait until the client takes it
        finally:
            ...  # generation.server_timing

    A request counts from entering to leaving the context: what is written inside holds the tenant's place. Whatever
    raises inside ends the request: StatusError with its status, a cancellation (the client left, or its deadline
    passed) as `Caller.cancellation` says, all else with INTERNAL. What runs below is then aborted, and logged, counted
    and traced is what happened.

    Args:
        edge: The worker.
        request: What the client asks for; checked here.
        caller: Who asks.

    Attributes:
        events: What happens, for one consumer, once; see `Event`. Raises StatusError for every end but OK.
        trace: The stop-watch.
    """

    def __init__(self, edge: Edge, request: generation_pb2.GenerateRequest, caller: Caller) -> None:
        self.trace = LatencyTrace()
        self._edge = edge
        self._request = request
        self._caller = caller
        self._headers = caller.trace_headers()
        self._tenant = DEFAULT_TENANT
        self._spans: RequestTrace | None = None
        if edge.tracer is not None:
            self._spans = RequestTrace.begin(edge.tracer, caller, self.trace, edge.model_name)
        trace_id = self._headers.trace_id if self._spans is None else self._spans.trace_id
        self._fields = RequestFields(trace_id=trace_id)
        self._ended_samples: list[generation_pb2.SampleFinished] = []
        self._finish: link_pb2.Finish | None = None
        self._num_tokens = 0
        self._latency: common_pb2.LatencyBreakdown | None = None
        self._lease: Lease | None = None
        self.events: AsyncGenerator[Event, None] = self._run()

    @property
    def server_timing(self) -> str:
        """Where the time went so far, as a value of Server-Timing (W3C)."""
        return server_timing(self._known_latency(), self._usage(), is_complete=self._latency is not None)

    async def __aenter__(self) -> Self:
        request_fields.set(self._fields)
        self._edge.metrics.count_accepted(self._caller.transport)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        failure: StatusError | None = None
        if isinstance(error, StatusError):
            failure = error
        elif isinstance(error, asyncio.CancelledError):
            failure = self._caller.cancellation()
        elif error is not None:
            failure = StatusError(grpc.StatusCode.INTERNAL, "internal error; see the line before")
        try:
            await self.events.aclose()
        finally:
            if self._lease is not None:
                self._lease.end(self._count_tokens())
            self._end(failure)
            code = failure.code if failure is not None else grpc.StatusCode.OK
            self._edge.metrics.count_end(self._caller.transport, code)

    async def _run(self) -> AsyncGenerator[Event, None]:
        edge, request = self._edge, self._request
        self._tenant = edge.access.tenant(self._caller.metadata)
        if not edge.access.is_open:
            self._fields.tenant = self._tenant.name
        self._fields.request_id = request.request_id if is_id(request.request_id) else f"req-{secrets.token_hex(8)}"
        # Before anything is checked: a request that is refused counts as well.
        self._lease = await edge.quotas.admit(self._tenant, max(request.priority, MIN_PRIORITY))
        validate_generate(request, edge.limits, edge.vocab_size)
        session = await self._load_session()
        prompt, submit = await self._prepare(session)
        if self._lease is not None:
            await self._lease.reserve(len(submit.token_ids) + submit.sampling.n * submit.sampling.max_tokens)
        samples = make_samples(request, submit.sampling.n, prompt.token_ids, edge.prompts.texts)
        trace = self.trace
        trace.submitted_at = trace.now()
        edge.metrics.submitted.inc()
        receiver = edge.schedulers.submit(submit, min_tokens=request.stream_interval or 1)
        answer = Answer(
            submit.token_ids, samples, trace, edge.metrics, lambda index: edge.schedulers.stop_sample(receiver, index)
        )
        try:
            await _wait_accepted(receiver)
            yield self._started(submit, session)
            while receiver.finish is None or receiver.has_more:
                await receiver.wait()
                for event in answer.take(receiver):
                    yield event
            _raise_failure(receiver.finish)
            if len(answer.ended_samples) < len(samples):
                raise StatusError(grpc.StatusCode.INTERNAL, "the scheduler ended the request before all of its samples")
        finally:
            trace.first_token_at, trace.last_token_at = receiver.first_token_at, receiver.last_token_at
            trace.finished_at = receiver.finished_at
            self._finish = receiver.finish
            self._num_tokens = len(submit.token_ids) + answer.num_tokens
            self._ended_samples = answer.ended_samples
            edge.schedulers.release(receiver, self._caller.abort_reason())
        assert self._finish is not None
        self._count_shown(self._finish.usage, answer)
        outcome = None
        if session is not None and prompt.continuation is not None:
            outcome = await self._save_turn(session, prompt, samples[0])
        yield self._finished(self._finish, outcome)

    async def _load_session(self) -> Session | None:
        request, trace = self._request, self.trace
        if not request.HasField("session_id"):
            return None
        trace.session_at = trace.now()
        sessions = self._edge.sessions.of(self._tenant)
        session = await sessions.load(request.session_id) or new_session()
        await sessions.check_room()
        trace.session_ns = trace.now() - trace.session_at
        return session

    async def _prepare(self, session: Session | None) -> tuple[Prompt, link_pb2.Submit]:
        edge, request, trace = self._edge, self._request, self.trace
        welcome = await edge.schedulers.wait_up(_LINK_WAIT)
        trace.tokenize_at = trace.now()
        prompt = await edge.prompts.build(
            request, session, caller=self._tenant.name, max_model_len=welcome.max_model_len
        )
        trace.tokenize_ns = trace.now() - trace.tokenize_at
        if request.WhichOneof("input") != "tokens":
            self._num_tokens = len(prompt.token_ids)  # encoding is work that counts, also where the request is refused
        if edge.tokenizer_size > edge.vocab_size:
            check_prompt_tokens(request, prompt.token_ids, edge.vocab_size, edge.prompts.model.tokenizer.id_to_token)
        return prompt, self._make_submit(prompt, fit_context(request, len(prompt.token_ids), welcome.max_model_len))

    def _make_submit(self, prompt: Prompt, max_tokens: int) -> link_pb2.Submit:
        request = self._request
        sampling = common_pb2.SamplingParams()
        sampling.CopyFrom(request.sampling)
        sampling.n = sampling.n or 1
        sampling.max_tokens = max_tokens
        if not sampling.HasField("seed"):
            sampling.seed = secrets.randbits(_SEED_BITS)
        headers = self._headers if self._spans is None else self._spans.submit()
        submit = link_pb2.Submit(
            request_id=self._fields.request_id,
            token_ids=prompt.token_ids,
            sampling=sampling,
            priority=request.priority,
            cache_salt=cache_salt(self._edge.salt_secret, self._tenant, request.cache_salt),
            tenant=cache_salt(self._edge.salt_secret, self._tenant),
            traceparent=headers.traceparent,
            tracestate=headers.tracestate,
            session_id=f"{self._tenant.name}:{request.session_id}" if request.session_id else "",
        )
        time_remaining = self._caller.time_remaining()
        if time_remaining is not None:
            if time_remaining <= 0:
                raise StatusError(grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline passed before generation began")
            submit.time_remaining_ns = min(int(time_remaining * 1e9), LONGEST_NS)  # clients may ask for 10^11 s
        return submit

    def _started(self, submit: link_pb2.Submit, session: Session | None) -> generation_pb2.Started:
        return generation_pb2.Started(
            request_id=submit.request_id,
            model=self._edge.model_name,
            prompt_tokens=len(submit.token_ids),
            seed=submit.sampling.seed,
            session_turns=len(session.turns) if session is not None else 0,
        )

    def _count_shown(self, usage: common_pb2.Usage, answer: Answer) -> None:
        """Make the usage that of the samples as they ended here.

        What an executor generates until it hears of a stop text depends on how fast everybody was.
        """
        num_shown = answer.num_tokens
        self._edge.metrics.tokens_beyond_stop.inc(max(0, usage.completion_tokens - num_shown))
        usage.completion_tokens = num_shown

    async def _save_turn(self, session: Session, prompt: Prompt, sample: SampleStream) -> SaveOutcome:
        request, edge = self._request, self._edge
        assert prompt.continuation is not None
        content = "".join(sample.answer_text)
        texts = edge.prompts.texts.after(prompt.token_ids)
        answer = answer_segment(texts, sample.answer_ids, content)
        new_messages = [(message.role, message.content) for message in request.chat.messages]
        extended = session.add_turn(new_messages, prompt.continuation, answer, content)
        return await edge.sessions.of(self._tenant).save(request.session_id, extended)

    def _finished(self, finish: link_pb2.Finish, outcome: SaveOutcome | None) -> generation_pb2.Finished:
        metrics = self._edge.metrics
        for sample in self._ended_samples:
            if (counter := metrics.success.get(sample.reason)) is not None:
                counter.inc()
        self._latency = self.trace.breakdown(finish.timings)
        metrics.observe_finished(self._latency, finish.usage, self._seconds_per_token(finish.usage))
        return generation_pb2.Finished(
            samples=self._ended_samples,
            usage=finish.usage,
            latency=self._latency,
            session=_SESSION_OUTCOMES[outcome] if outcome is not None else None,
        )

    def _seconds_per_token(self, usage: common_pb2.Usage) -> float:
        """Mean time between tokens of one sample; 0 without a second token."""
        following = usage.completion_tokens / max(1, len(self._ended_samples)) - 1
        return (self.trace.last_token_at - self.trace.first_token_at) / 1e9 / following if following > 0 else 0.0

    def _count_tokens(self) -> int:
        """What counts towards the tenant's limit: nothing for a refusal, and what is known here of an early end."""
        finish = self._finish
        if finish is None:
            return self._num_tokens
        is_refusal = finish.status.code and not finish.usage.completion_tokens
        return 0 if is_refusal else finish.usage.prompt_tokens + finish.usage.completion_tokens

    def _known_latency(self) -> common_pb2.LatencyBreakdown:
        """The breakdown of the last message, or what is known without one."""
        return self._latency or self.trace.breakdown(self._finish.timings if self._finish is not None else None)

    def _usage(self) -> common_pb2.Usage | None:
        return self._finish.usage if self._finish is not None and self._finish.HasField("usage") else None

    def _end(self, error: StatusError | None) -> None:
        """Say how it went, in the log and the trace. `error` is its status; None = OK."""
        end = RequestEnd(self._request, error, self._known_latency(), self._usage())
        if self._edge.request_log.wants(error):
            self._edge.request_log.write(end)
        if self._spans is not None:
            self._spans.end(end, self._fields, self._finish, self._ended_samples)


async def _wait_accepted(receiver: TokenReceiver) -> None:
    """Return once the request is taken to be accepted. Raises StatusError if it is refused at once."""
    try:
        async with asyncio.timeout(_ACCEPTANCE):
            await receiver.wait()
    except TimeoutError:
        pass
    _raise_failure(receiver.finish)
    receiver.wake()  # what came is still to be taken


def _raise_failure(finish: link_pb2.Finish | None) -> None:
    if finish is not None and finish.status.code:
        raise StatusError.from_link(finish.status)
