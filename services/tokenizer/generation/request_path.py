"""The path of one request through the edge: from the client's request to the events that answer it."""

from __future__ import annotations

import asyncio
import secrets
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Sequence
from itertools import takewhile
from types import TracebackType
from typing import Self

import grpc

from scalellm.services.common.api_keys import DEFAULT_TENANT
from scalellm.services.common.errors import StatusError
from scalellm.services.common.field_rules import MAX_PREDICTION, MIN_PRIORITY
from scalellm.services.common.link import LONGEST_NS
from scalellm.services.common.logs import RequestFields, request_fields
from scalellm.services.tokenizer.generation.answer import Answer, Event, make_samples
from scalellm.services.tokenizer.generation.answer_shape import AnswerShape, tell_apart
from scalellm.services.tokenizer.generation.caller import Caller
from scalellm.services.tokenizer.generation.edge import Edge, TenantSalt
from scalellm.services.tokenizer.generation.ending import count_shown, make_finished, save_turn
from scalellm.services.tokenizer.generation.submission import raise_failure, wait_accepted
from scalellm.services.tokenizer.kept.following import follow
from scalellm.services.tokenizer.kept.journal import Head, digest
from scalellm.services.tokenizer.kept.kept_request import KeptRequest
from scalellm.services.tokenizer.latency import LatencyTrace, server_timing
from scalellm.services.tokenizer.prompt_builder import Prompt
from scalellm.services.tokenizer.quotas import Lease
from scalellm.services.tokenizer.request_log import RequestEnd
from scalellm.services.tokenizer.request_trace import RequestTrace
from scalellm.services.tokenizer.sample_stream import OutputOptions
from scalellm.services.tokenizer.sampling_defaults import with_defaults
from scalellm.services.tokenizer.session import Session, new_session
from scalellm.services.tokenizer.validation import (
    check_prompt_tokens,
    fit_context,
    is_id,
    validate_generate,
    validate_resume,
)
from scalellm.v1 import common_pb2, generation_pb2, link_pb2

_LINK_WAIT = 1.5
"""Seconds that a new request waits for a link to a scheduler, so that a scheduler's restart causes no errors."""

# JSON and JavaScript clients represent integers below 2^53 exactly.
_SEED_BITS = 53


class Call(ABC):
    """One call that is answered with events, from its arrival until its answer was written.

    Every protocol uses it in the same way:

        generation = Generation(edge, request, caller)
        try:
            async with generation:
                async for event in generation.events:
                    ...  # write it, and wait until the client takes it
        finally:
            ...  # generation.server_timing

    A call counts as running from entering to leaving the context. An exception inside the context ends the call:
    StatusError with its status, a cancellation or a failed write (the client left, or its deadline passed) with
    `Caller.cancellation`, any other with INTERNAL. The request is then aborted, unless it is kept, and its end is
    logged, counted and traced.

    Args:
        edge: The worker.
        request: The request for generation, or as much of it as is known.
        caller: The caller.

    Attributes:
        events: Events of the request, for one consumer, once; see `Event`. Raises StatusError for every end but OK.
        trace: Times of the request.
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
        """Return the latency breakdown so far, as a value of Server-Timing (W3C)."""
        return server_timing(self._known_latency(), self._usage(), is_complete=self._latency is not None)

    async def __aenter__(self) -> Self:
        request_fields.set(self._fields)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        failure: StatusError | None = None
        if isinstance(error, StatusError):
            failure = error
        elif isinstance(error, asyncio.CancelledError | ConnectionError | grpc.aio.BaseError):
            failure = self._caller.cancellation()
        elif error is not None:
            failure = StatusError(grpc.StatusCode.INTERNAL, "internal error; see the line before")
        try:
            await self.events.aclose()
        finally:
            if self._lease is not None:
                self._lease.end(self._count_tokens())
            self._end(failure)

    @abstractmethod
    def _run(self) -> AsyncGenerator[Event, None]:
        """Run the request and yield its events."""

    def _identify(self, request_id: str) -> None:
        """Set the tenant and the request's id. Raises StatusError if the caller is not authorised."""
        edge = self._edge
        self._tenant = edge.access.tenant()
        if not edge.access.is_open:
            self._fields.tenant = self._tenant.name
        self._fields.request_id = request_id

    async def _follow(
        self, kept: KeptRequest, offsets: Sequence[int], min_tokens: int, *, repeats: bool = False
    ) -> AsyncGenerator[Event, None]:
        """Yield the events of a kept request."""
        async for event in follow(kept, offsets, min_tokens, self.trace, repeats=repeats):
            if isinstance(event, generation_pb2.Finished):
                self._finish = link_pb2.Finish(usage=event.usage)
                self._ended_samples = list(event.samples)
                self._latency = event.latency
            yield event

    def _count_tokens(self) -> int:
        """Return the tokens that count towards the tenant's limit: 0 for a refusal, else those of the prompt and the
        ones shown. Tokens that an executor generated beyond these do not count, because the client did not cause them.
        """
        finish = self._finish
        is_refusal = finish is not None and finish.status.code and not finish.usage.completion_tokens
        return 0 if is_refusal else self._num_tokens

    def _known_latency(self) -> common_pb2.LatencyBreakdown:
        """Return the breakdown of the last message, or of the times known so far."""
        return self._latency or self.trace.breakdown(self._finish.timings if self._finish is not None else None)

    def _usage(self) -> common_pb2.Usage | None:
        return self._finish.usage if self._finish is not None and self._finish.HasField("usage") else None

    def _end(self, error: StatusError | None) -> None:
        """Log and trace the end of the call. `error` is its status; None = OK."""
        is_logged = self._edge.request_log.wants(error)
        if not is_logged and self._spans is None:
            return
        end = RequestEnd(self._request, error, self._known_latency(), self._usage())
        if is_logged:
            self._edge.request_log.write(end)
        if self._spans is not None:
            self._spans.end(end, self._fields, self._finish, self._ended_samples)


class Generation(Call):
    """A new request, or one that was begun before under the same id and is kept.

    Args:
        edge: The worker.
        request: The client's request.
        caller: The caller.
        asked: See Head.
    """

    def __init__(self, edge: Edge, request: generation_pb2.GenerateRequest, caller: Caller, asked: bytes = b"") -> None:
        super().__init__(edge, request, caller)
        self._asked = asked

    async def __aenter__(self) -> Self:
        self._edge.metrics.count_accepted(self._caller.transport)
        return await super().__aenter__()

    async def _run(self) -> AsyncGenerator[Event, None]:
        edge, request, trace = self._edge, self._request, self.trace
        self._identify(request.request_id if is_id(request.request_id) else f"req-{secrets.token_hex(8)}")
        tell_apart(request, edge.prompts.writing)
        is_kept = request.on_disconnect == generation_pb2.ON_DISCONNECT_KEEP
        if is_kept and is_id(request.request_id) and await edge.kept.find_same(edge, self._tenant, request) is not None:
            async with edge.quotas.reading(self._tenant):
                # again, because it is not followed for long without a reader
                if (kept := await edge.kept.find_same(edge, self._tenant, request)) is not None:
                    async for event in self._follow(kept, (), request.stream_interval or 1):
                        yield event
                    return
        # Check the queue before any costly work: under overload most requests end here.
        salt = TenantSalt(edge.salt_secret, self._tenant)
        edge.schedulers.check_room(salt.tenant)
        # Count the request before it is checked, because a refused request counts as well.
        self._lease = await edge.quotas.admit(self._tenant, max(request.priority, MIN_PRIORITY))
        validate_generate(request, edge.limits, edge.vocab_size)
        shape = AnswerShape(request, edge.prompts.writing)
        session = await self._load_session()
        prompt, submit = await self._prepare(session, salt)
        submit.grammar = shape.grammar(submit.token_ids)
        if self._lease is not None:
            await self._lease.reserve(len(submit.token_ids) + submit.sampling.n * submit.sampling.max_tokens)
        await edge.schedulers.wait_up(_LINK_WAIT)  # again, because encoding and quotas may have taken long
        if is_kept and (kept := await self._keep(submit, prompt, session)) is not None:
            async for event in self._follow(kept, (), request.stream_interval or 1):
                yield event
            return
        samples = make_samples(request, OutputOptions.from_request(request), submit, edge.prompts.writing)
        trace.submitted_at = trace.now()
        edge.metrics.submitted.inc()
        receiver = edge.schedulers.submit(submit, min_tokens=request.stream_interval or 1)
        answer = Answer(
            submit.token_ids,
            samples,
            trace,
            edge.model_metrics,
            lambda index: edge.schedulers.stop_sample(receiver, index),
        )
        try:
            await wait_accepted(receiver)
            yield self._started(submit, session)
            while receiver.finish is None or receiver.has_more:
                await receiver.wait()
                for event in answer.take(receiver):
                    yield event
            raise_failure(receiver.finish)
            if len(answer.ended_samples) < len(samples):
                raise StatusError(grpc.StatusCode.INTERNAL, "the scheduler ended the request before all of its samples")
        finally:
            trace.leave_below(receiver)
            self._finish = receiver.finish
            self._num_tokens = len(submit.token_ids) + answer.num_tokens
            self._ended_samples = answer.ended_samples
            edge.schedulers.release(receiver, self._caller.abort_reason())
        assert self._finish is not None
        count_shown(edge.metrics, self._finish.usage, answer.num_tokens, samples)
        outcome = None
        if session is not None:
            outcome = await save_turn(edge, self._tenant, request, session, prompt, samples[0])
        finished = make_finished(edge.model_metrics, trace, self._finish, self._ended_samples, outcome)
        self._latency = finished.latency
        yield finished

    async def _keep(self, submit: link_pb2.Submit, prompt: Prompt, session: Session | None) -> KeptRequest | None:
        """Start the request as a kept one, which runs independently of this call. Returns None if it cannot be kept."""
        submit.execution_id = secrets.token_bytes(16)
        started = self._started(submit, session, resumable=True)
        version = session.version if session is not None else ""
        head = Head(digest(self._request), self._request, submit, started, version, self._asked)
        kept = await self._edge.kept.begin(
            self._edge,
            self._tenant,
            head,
            self._caller.time_remaining(),
            lease=self._lease,
            trace=self.trace,
            prompt=prompt,
            session=session,
        )
        if kept is None:
            # If Redis creates the journal after all, whoever takes the id over must not end this execution.
            submit.ClearField("execution_id")
        elif kept.head is head:
            self._lease = None  # the kept request ends it
        return kept

    async def _load_session(self) -> Session | None:
        request, trace = self._request, self.trace
        if not request.HasField("session_id"):
            return None
        trace.session_at = trace.now()
        sessions = self._edge.sessions.of(self._tenant)
        session = await sessions.load(request.session_id) or new_session()
        self._edge.models.check_session(request.session_id, session.model, self._edge)
        await sessions.check_room()
        trace.session_ns = trace.now() - trace.session_at
        return session

    async def _prepare(self, session: Session | None, salt: TenantSalt) -> tuple[Prompt, link_pb2.Submit]:
        edge, request, trace = self._edge, self._request, self.trace
        welcome = await edge.schedulers.wait_up(_LINK_WAIT)
        trace.tokenize_at = trace.now()
        prompt = await edge.prompts.build(
            request, session, caller=self._tenant.name, max_model_len=welcome.max_model_len
        )
        trace.tokenize_ns = trace.now() - trace.tokenize_at
        if request.WhichOneof("input") != "tokens":
            self._num_tokens = len(prompt.token_ids)  # the work of encoding counts, even if the request is refused
        if edge.tokenizer_size > edge.vocab_size:
            check_prompt_tokens(request, prompt.token_ids, edge.vocab_size, edge.prompts.model.tokenizer.id_to_token)
        max_tokens = fit_context(request, len(prompt.token_ids), welcome.max_model_len)
        submit = self._make_submit(prompt, max_tokens, salt)
        if request.prediction:
            predicted = await edge.prompts.predicted(
                request.prediction, caller=self._tenant.name, max_tokens=MAX_PREDICTION
            )
            # An answer cannot repeat a token that the model lacks, and nobody is refused for a guess.
            submit.prediction_token_ids.extend(takewhile(lambda token_id: token_id < edge.vocab_size, predicted))
        return prompt, submit

    def _make_submit(self, prompt: Prompt, max_tokens: int, salt: TenantSalt) -> link_pb2.Submit:
        request = self._request
        sampling = with_defaults(request.sampling, self._edge.sampling_defaults)
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
            cache_salt=salt.of_request(request.cache_salt),
            tenant=salt.tenant,
            tenant_weight=self._tenant.limits.weight,
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

    def _started(
        self, submit: link_pb2.Submit, session: Session | None, *, resumable: bool = False
    ) -> generation_pb2.Started:
        return generation_pb2.Started(
            request_id=submit.request_id,
            model=self._edge.model_name,
            prompt_tokens=len(submit.token_ids),
            seed=submit.sampling.seed,
            session_turns=len(session.turns) if session is not None else 0,
            resumable=resumable,
            prompt_token_ids=submit.token_ids if self._request.return_prompt_token_ids else (),
        )

    def _end(self, error: StatusError | None) -> None:
        super()._end(error)
        code = error.code if error is not None else grpc.StatusCode.OK
        self._edge.metrics.count_end(self._caller.transport, code)


class Resumption(Call):
    """A call that reads the rest of a kept request.

    Args:
        edge: The worker.
        resume: The request and the position in it.
        caller: The caller.
        again: The whole request, if the client sent it again. The events then begin with those that the client has
            already, because formats that number their events have to count them. See `follow`.
    """

    def __init__(
        self,
        edge: Edge,
        resume: generation_pb2.ResumeRequest,
        caller: Caller,
        again: generation_pb2.GenerateRequest | None = None,
    ) -> None:
        super().__init__(edge, again or generation_pb2.GenerateRequest(request_id=resume.request_id), caller)
        self._resume = resume
        self._again = again
        self.trace.first_token_at = self.trace.arrived_at  # the call that began the request has counted its first token

    async def _run(self) -> AsyncGenerator[Event, None]:
        edge, resume = self._edge, self._resume
        self._identify(resume.request_id if is_id(resume.request_id) else "")
        validate_resume(resume)
        async with edge.quotas.reading(self._tenant):
            kept = await edge.kept.find(edge.models, self._tenant, resume.request_id)
            if self._again is not None:
                kept.head.check_same(self._again)
            self._request = kept.head.request
            repeats = self._again is not None
            async for event in self._follow(kept, resume.offsets, resume.stream_interval or 1, repeats=repeats):
                yield event
