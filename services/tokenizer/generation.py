"""`scalellm.v1.Generation`: a request's whole way through the edge."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc

from scalellm.v1 import common_pb2, generation_pb2, link_pb2
from services.common.access import Access
from services.common.api_keys import DEFAULT_TENANT, Tenant
from services.common.errors import StatusError
from services.common.link import LONGEST_NS
from services.common.logs import RequestFields, request_fields
from services.common.tracing import TraceHeaders
from services.tokenizer.latency import LatencyTrace, server_timing
from services.tokenizer.limits import RequestLimits
from services.tokenizer.metrics import EdgeMetrics
from services.tokenizer.prompt_builder import Prompt, PromptBuilder
from services.tokenizer.quotas import Lease, TenantQuotas
from services.tokenizer.request_log import RequestEnd, RequestLog
from services.tokenizer.request_trace import RequestTrace
from services.tokenizer.sample_stream import OutputOptions, SampleStream
from services.tokenizer.scheduler_link import SchedulerLink
from services.tokenizer.session import Session, new_session
from services.tokenizer.session_store import SaveOutcome, SessionStore
from services.tokenizer.text.conversation import answer_segment
from services.tokenizer.text.stop_strings import StopStrings
from services.tokenizer.token_receiver import TokenReceiver
from services.tokenizer.validation import MIN_PRIORITY, check_prompt_tokens, fit_context, is_id, validate_generate

if TYPE_CHECKING:
    from services.common.tracing.tracer import Tracer

_LINK_WAIT = 1.5
"""Seconds a new request waits for the link to come (back): a scheduler that restarts is not an error to its clients."""

_ACCEPTANCE = 0.05
"""Seconds given to the scheduler to refuse a request before Started says that it was accepted. A refusal before the
first message leaves gRPC's own retry policies free to act."""

# Every JSON and JavaScript client keeps integers below 2^53 as they are.
_SEED_BITS = 53

_SALT_BYTES = 16
_DEFAULT_SECRET = b"scalellm prefix cache"

_SESSION_OUTCOMES = {
    SaveOutcome.SAVED: generation_pb2.SESSION_OUTCOME_SAVED,
    SaveOutcome.CONFLICT: generation_pb2.SESSION_OUTCOME_CONFLICT,
    SaveOutcome.UNAVAILABLE: generation_pb2.SESSION_OUTCOME_UNAVAILABLE,
    SaveOutcome.FULL: generation_pb2.SESSION_OUTCOME_FULL,
}


def cache_salt(secret: str, tenant: Tenant = DEFAULT_TENANT, request_salt: str = "") -> bytes:
    """Derive a prefix-cache salt from a tenant and what a request says: the same in all workers and after restarts."""
    salt = hmac.digest(secret.encode() or _DEFAULT_SECRET, tenant.name.encode(), hashlib.sha256)
    if request_salt:
        salt = hmac.digest(salt, request_salt.encode(), hashlib.sha256)
    return salt[:_SALT_BYTES]


@dataclass(frozen=True, slots=True)
class Edge:
    """State that the servicers of one worker share.

    Attributes:
        tokenizer_size: Ids of the tokenizer's tokens are below it. The model may have more, its matrices being padded,
            or fewer, where text of a special token is none for it.
    """

    model_name: str
    prompts: PromptBuilder
    tokenizer_size: int
    link: SchedulerLink
    sessions: SessionStore
    limits: RequestLimits
    metrics: EdgeMetrics
    salt_secret: str
    access: Access
    quotas: TenantQuotas
    request_log: RequestLog
    tracer: Tracer | None

    @property
    def vocab_size(self) -> int:
        """Ids that the model knows are below it: all that it reads or writes."""
        return self.link.vocab_size or self.tokenizer_size


class GenerationServicer:
    """Serves Generate. Raises StatusError for every outcome but OK.

    Args:
        edge: The worker.
    """

    def __init__(self, edge: Edge) -> None:
        self._edge = edge

    async def Generate(self, request: generation_pb2.GenerateRequest, context: grpc.aio.ServicerContext) -> None:
        """Stream an answer."""
        metrics = self._edge.metrics
        metrics.accepted.inc()
        call = _GenerateCall(self._edge, request, context)
        failure: StatusError | None = StatusError(grpc.StatusCode.INTERNAL, "internal error; see the line before")
        try:
            await call.run()
            failure = None
        except StatusError as error:
            failure = error
            raise
        except asyncio.CancelledError:
            failure = call.make_cancellation()
            raise
        finally:
            call.end(failure)
            metrics.count_end(failure.code if failure is not None else grpc.StatusCode.OK)


class _GenerateCall:
    """One request, from its arrival to its last message."""

    def __init__(self, edge: Edge, request: generation_pb2.GenerateRequest, context: grpc.aio.ServicerContext) -> None:
        self.trace = LatencyTrace()
        self._edge = edge
        self._request = request
        self._context = context
        self._headers = TraceHeaders.from_metadata(context.invocation_metadata())
        self._tenant = DEFAULT_TENANT
        self._spans: RequestTrace | None = None
        if edge.tracer is not None:
            self._spans = RequestTrace.begin(edge.tracer, self._headers, self.trace, edge.model_name)
        trace_id = self._headers.trace_id if self._spans is None else self._spans.trace_id
        self._fields = RequestFields(trace_id=trace_id)
        self._ended_samples: list[generation_pb2.SampleFinished] = []
        self._finish: link_pb2.Finish | None = None
        self._num_tokens = 0
        self._latency: common_pb2.LatencyBreakdown | None = None
        request_fields.set(self._fields)

    async def run(self) -> None:
        """Serve the request. Raises StatusError."""
        edge, request = self._edge, self._request
        self._tenant = edge.access.tenant(self._context.invocation_metadata())
        if not edge.access.is_open:
            self._fields.tenant = self._tenant.name
        self._fields.request_id = request.request_id if is_id(request.request_id) else f"req-{secrets.token_hex(8)}"
        # Before anything is checked: a request that is refused counts as well.
        lease = await edge.quotas.admit(self._tenant, max(request.priority, MIN_PRIORITY))
        try:
            validate_generate(request, edge.limits, edge.vocab_size)
            await self._generate(lease)
        finally:
            if lease is not None:
                lease.end(self._count_tokens())

    async def _generate(self, lease: Lease | None) -> None:
        edge, request, trace = self._edge, self._request, self.trace
        session = None
        if request.HasField("session_id"):
            trace.session_at = trace.now()
            sessions = edge.sessions.of(self._tenant)
            session = await sessions.load(request.session_id) or new_session()
            await sessions.check_room()
            trace.session_ns = trace.now() - trace.session_at
        welcome = await edge.link.wait_up(_LINK_WAIT)
        trace.tokenize_at = trace.now()
        prompt = await edge.prompts.build(
            request, session, caller=self._tenant.name, max_model_len=welcome.max_model_len
        )
        trace.tokenize_ns = trace.now() - trace.tokenize_at
        if request.WhichOneof("input") != "tokens":
            self._num_tokens = len(prompt.token_ids)  # encoding is work that counts, also where the request is refused
        if edge.tokenizer_size > edge.vocab_size:
            check_prompt_tokens(request, prompt.token_ids, edge.vocab_size, edge.prompts.model.tokenizer.id_to_token)
        submit = self._make_submit(prompt, fit_context(request, len(prompt.token_ids), welcome.max_model_len))
        if lease is not None:
            await lease.reserve(len(submit.token_ids) + submit.sampling.n * submit.sampling.max_tokens)
        options = OutputOptions.from_request(request)
        stops = StopStrings(request.stop) if request.stop else None
        texts = edge.prompts.texts.after(prompt.token_ids)
        samples = [SampleStream(index, options, texts, stops) for index in range(submit.sampling.n)]
        trace.submitted_at = trace.now()
        edge.metrics.submitted.inc()
        receiver = edge.link.submit(submit, min_tokens=request.stream_interval or 1)
        try:
            await self._accepted(receiver, submit, session)
            await self._stream(receiver, samples, submit)
        finally:
            trace.first_token_at, trace.last_token_at = receiver.first_token_at, receiver.last_token_at
            trace.finished_at = receiver.finished_at
            self._finish = receiver.finish
            self._num_tokens = len(submit.token_ids) + sum(sample.num_tokens for sample in samples)
            self._ended_samples = [sample.ended for sample in samples if sample.ended is not None]
            edge.link.release(receiver, self._abort_reason())
        self._count_shown(samples)
        outcome = None
        if session is not None and prompt.continuation is not None:
            outcome = await self._save_turn(session, prompt, samples[0])
        await self._write_finished(outcome)

    def end(self, error: StatusError | None) -> None:
        """Say how it went: in the trailing metadata, the log and the trace. `error` is its status; None = OK."""
        finish = self._finish
        # The breakdown of the last message, or what is known without one.
        latency = self._latency or self.trace.breakdown(finish.timings if finish is not None else None)
        usage = finish.usage if finish is not None and finish.HasField("usage") else None
        timing = server_timing(latency, usage, is_complete=self._latency is not None)
        self._context.set_trailing_metadata((("server-timing", timing),))
        end = RequestEnd(self._request, error, latency, usage)
        if self._edge.request_log.wants(error):
            self._edge.request_log.write(end)
        if self._spans is not None:
            self._spans.end(end, self._fields, finish, self._ended_samples)

    def make_cancellation(self) -> StatusError:
        """Why gRPC cancelled the call."""
        if self._abort_reason() == link_pb2.ABORT_REASON_DEADLINE:
            return StatusError(grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline passed")
        return StatusError(grpc.StatusCode.CANCELLED, "the client cancelled the request")

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
        time_remaining = self._context.time_remaining()
        if time_remaining is not None:
            if time_remaining <= 0:
                raise StatusError(grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline passed before generation began")
            submit.time_remaining_ns = min(int(time_remaining * 1e9), LONGEST_NS)  # clients may ask for 10^11 s
        return submit

    async def _accepted(self, receiver: TokenReceiver, submit: link_pb2.Submit, session: Session | None) -> None:
        """Say that the request was accepted, unless it is refused at once."""
        try:
            async with asyncio.timeout(_ACCEPTANCE):
                await receiver.wait()
        except TimeoutError:
            pass
        _raise_failure(receiver.finish)
        receiver.wake()  # what came is still to be taken
        started = generation_pb2.Started(
            request_id=submit.request_id,
            model=self._edge.model_name,
            prompt_tokens=len(submit.token_ids),
            seed=submit.sampling.seed,
            session_turns=len(session.turns) if session is not None else 0,
        )
        await self._context.write(generation_pb2.GenerateResponse(started=started))

    async def _stream(self, receiver: TokenReceiver, samples: Sequence[SampleStream], submit: link_pb2.Submit) -> None:
        """Write deltas until the request's Finish. Returns only if that is OK."""
        metrics, trace, write = self._edge.metrics, self.trace, self._context.write
        sent_at = [0] * len(samples)
        while receiver.finish is None or receiver.has_more:
            await receiver.wait()
            while parts := receiver.take_prompt_logprobs():
                for offset, logprobs in parts:
                    token_ids = submit.token_ids[offset : offset + len(logprobs.logprobs)]
                    part = generation_pb2.PromptLogprobs(token_ids=token_ids, logprobs=logprobs, offset=offset)
                    await write(generation_pb2.GenerateResponse(prompt_logprobs=part))
            for batch in receiver.take():
                index = batch.index
                sample = samples[index]
                had_ended = sample.ended is not None
                started = trace.now()
                response = sample.push(batch)
                now = trace.now()
                trace.detokenize_cpu_ns += now - started
                if sample.ended is not None and batch.finish is None and not had_ended:
                    self._edge.link.stop_sample(receiver, index)
                if response is None:
                    continue
                if sent_at[index]:
                    metrics.observe_gap((now - sent_at[index]) / 1e9)
                else:
                    self._observe_first(receiver)
                sent_at[index] = now
                await write(response)
        _raise_failure(receiver.finish)
        if any(sample.ended is None for sample in samples):
            raise StatusError(grpc.StatusCode.INTERNAL, "the scheduler ended the request before all of its samples")

    def _count_shown(self, samples: Sequence[SampleStream]) -> None:
        """Make the usage that of the samples as they ended here.

        What an executor generates until it hears of a stop text depends on how fast everybody was.
        """
        assert self._finish is not None
        usage = self._finish.usage
        num_shown = sum(sample.num_tokens for sample in samples)
        self._edge.metrics.tokens_beyond_stop.inc(max(0, usage.completion_tokens - num_shown))
        usage.completion_tokens = num_shown

    def _observe_first(self, receiver: TokenReceiver) -> None:
        """The first message of a sample; time to first token is counted once per request."""
        if not self.trace.first_token_at:
            self.trace.first_token_at = receiver.first_token_at
            self._edge.metrics.ttft.observe(self.trace.ttft_seconds)

    async def _save_turn(self, session: Session, prompt: Prompt, sample: SampleStream) -> SaveOutcome:
        request, edge = self._request, self._edge
        assert prompt.continuation is not None
        content = "".join(sample.answer_text)
        texts = edge.prompts.texts.after(prompt.token_ids)
        answer = answer_segment(texts, sample.answer_ids, content)
        new_messages = [(message.role, message.content) for message in request.chat.messages]
        extended = session.add_turn(new_messages, prompt.continuation, answer, content)
        return await edge.sessions.of(self._tenant).save(request.session_id, extended)

    async def _write_finished(self, outcome: SaveOutcome | None) -> None:
        finish = self._finish
        assert finish is not None
        metrics = self._edge.metrics
        for sample in self._ended_samples:
            if (counter := metrics.success.get(sample.reason)) is not None:
                counter.inc()
        self._latency = self.trace.breakdown(finish.timings)
        metrics.observe_finished(self._latency, finish.usage, self._seconds_per_token(finish.usage))
        finished = generation_pb2.Finished(
            samples=self._ended_samples,
            usage=finish.usage,
            latency=self._latency,
            session=_SESSION_OUTCOMES[outcome] if outcome is not None else None,
        )
        await self._context.write(generation_pb2.GenerateResponse(finished=finished))

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

    def _abort_reason(self) -> link_pb2.AbortReason:
        time_remaining = self._context.time_remaining()
        if time_remaining is not None and time_remaining <= 0:
            return link_pb2.ABORT_REASON_DEADLINE
        return link_pb2.ABORT_REASON_CANCELLED


def _raise_failure(finish: link_pb2.Finish | None) -> None:
    if finish is not None and finish.status.code:
        raise StatusError.from_link(finish.status)
