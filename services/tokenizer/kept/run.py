"""One run of a kept request in this worker, from its Submit to its last event."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import grpc

from scalellm.services.common.api_keys import Tenant
from scalellm.services.common.errors import StatusError
from scalellm.services.common.link import LONGEST_NS, copy_logprobs
from scalellm.services.tokenizer.generation.answer import make_samples
from scalellm.services.tokenizer.generation.ending import count_shown, make_finished, save_turn
from scalellm.services.tokenizer.generation.submission import raise_failure, wait_accepted
from scalellm.services.tokenizer.kept.journal import Head
from scalellm.services.tokenizer.kept.transcript import Transcript
from scalellm.services.tokenizer.latency import LatencyTrace
from scalellm.services.tokenizer.prompt_builder import Prompt
from scalellm.services.tokenizer.sample_stream import OutputOptions, SampleStream
from scalellm.services.tokenizer.session import Session, new_session
from scalellm.services.tokenizer.token_receiver import TokenBatch, TokenReceiver
from scalellm.v1 import common_pb2, generation_pb2, link_pb2

if TYPE_CHECKING:
    from scalellm.services.tokenizer.generation.edge import Edge

_ATTEMPTS_PER_FENCE = 2**16
"""Attempt numbers per fence, so that after a takeover each attempt is higher than any that the old worker may send."""


class Run:
    """Runs a request from the end of its transcript to its own end.

    Args:
        edge: The worker.
        tenant: The tenant.
        head: The request.
        transcript: Its results; new ones are added there.
        trace: Times of the request.
        prompt: The prompt with the session's segments, if it was built here.
        session: The session that the request continues, if it was loaded here.
    """

    def __init__(
        self,
        edge: Edge,
        tenant: Tenant,
        head: Head,
        transcript: Transcript,
        trace: LatencyTrace,
        prompt: Prompt | None,
        session: Session | None,
    ) -> None:
        self._edge = edge
        self._tenant = tenant
        self._head = head
        self._transcript = transcript
        self._trace = trace
        self._prompt = prompt
        self._session = session

    async def run(self, fence: int, time_left: float | None, accepted: asyncio.Event) -> None:
        """Run the request. Raises StatusError unless it finishes.

        Args:
            fence: See Journal.
            time_left: Seconds until the deadline.
            accepted: Set once the request counts as accepted.
        """
        edge, head, transcript, trace = self._edge, self._head, self._transcript, self._trace
        samples = self._watchers()
        finish: link_pb2.Finish | None = None
        if not transcript.has_all:
            receiver = None
            try:
                submit = self._make_submit(fence, time_left)
                edge.metrics.submitted.inc()
                trace.submitted_at = trace.now()
                receiver = edge.schedulers.submit(submit)
                if not accepted.is_set():
                    await wait_accepted(receiver)
                    accepted.set()
                await self._receive(receiver, samples)
            finally:
                if receiver is not None:
                    trace.leave_below(receiver)
                    finish = receiver.finish
                    edge.schedulers.release(receiver, link_pb2.ABORT_REASON_CANCELLED)
        if finish is None:  # its old worker had all tokens, but could not write the end
            usage = common_pb2.Usage(prompt_tokens=len(head.submit.token_ids), completion_tokens=transcript.num_tokens)
            finish = link_pb2.Finish(usage=usage)
        count_shown(edge.metrics, finish.usage, transcript.num_tokens, samples)
        outcome = await self._save_turn(samples[0]) if head.request.HasField("session_id") else None
        ended = [sample.ended for sample in samples if sample.ended is not None]
        transcript.end(make_finished(edge.model_metrics, trace, finish, ended, outcome))

    def _make_submit(self, fence: int, time_left: float | None) -> link_pb2.Submit:
        submit = link_pb2.Submit()
        submit.CopyFrom(self._head.submit)
        submit.attempt = (fence - 1) * _ATTEMPTS_PER_FENCE
        if time_left is not None:
            if time_left <= 0:
                raise StatusError(grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline passed")
            submit.time_remaining_ns = min(int(time_left * 1e9), LONGEST_NS)
        self._transcript.resume(submit)
        return submit

    def _watchers(self) -> list[SampleStream]:
        """Make the streams that find stop texts and keep the answer for a session, advanced to the transcript's end."""
        request = self._head.request
        options = dataclasses.replace(OutputOptions.from_request(request), text=False, token_ids=False, logprobs=False)
        samples = make_samples(request, options, self._head.submit, self._edge.prompts.writing)
        for index, log in enumerate(self._transcript.samples):
            if log.token_ids or log.finish is not None:
                samples[index].push(TokenBatch(index, log.token_ids.tolist(), None, log.finish))
        return samples

    async def _receive(self, receiver: TokenReceiver, samples: Sequence[SampleStream]) -> None:
        """Add received results to the transcript until the request's Finish. Raises StatusError unless that is OK."""
        transcript = self._transcript
        while receiver.finish is None or receiver.has_more:
            await receiver.wait()
            while parts := receiver.take_prompt_logprobs():
                for offset, logprobs in parts:
                    transcript.add_prompt_logprobs(offset, logprobs)
            for batch in receiver.take():
                sample = samples[batch.index]
                if transcript.samples[batch.index].finish is not None:
                    continue
                before = sample.num_tokens
                sample.push(batch)
                transcript.first_token_at = transcript.first_token_at or receiver.first_token_at
                if sample.ended is not None and sample.ended.HasField("stop"):
                    if batch.finish is None:
                        self._edge.schedulers.stop_sample(receiver, batch.index)
                    batch = _up_to_stop(batch, sample.num_tokens - before)
                transcript.add(batch)
        raise_failure(receiver.finish)
        if not transcript.has_all:
            raise StatusError(grpc.StatusCode.INTERNAL, "the scheduler ended the request before all of its samples")

    async def _save_turn(self, sample: SampleStream) -> generation_pb2.SessionOutcome:
        """Store the turn once, even if several workers try: its version is derived from the request."""
        edge, request, tenant = self._edge, self._head.request, self._tenant
        version = self._head.submit.execution_id.hex()
        prompt, session = self._prompt, self._session
        if prompt is None or session is None:
            sessions = edge.sessions.of(tenant)
            try:
                session = await sessions.load(request.session_id) or new_session()
            except StatusError:
                return generation_pb2.SESSION_OUTCOME_UNAVAILABLE
            if session.version == version:
                return generation_pb2.SESSION_OUTCOME_SAVED
            if session.version != self._head.session_version:
                return generation_pb2.SESSION_OUTCOME_CONFLICT
            max_model_len = len(self._head.submit.token_ids) + 1
            prompt = await edge.prompts.build(request, session, caller=tenant.name, max_model_len=max_model_len)
        return await save_turn(edge, tenant, request, session, prompt, sample, version)


def _up_to_stop(batch: TokenBatch, num_tokens: int) -> TokenBatch:
    """Return the part of a batch up to the stop text that ended its sample. Readers will find the stop text again."""
    if num_tokens == len(batch.token_ids) and batch.finish is not None:
        return batch  # the stop text was found when the held-back text was flushed
    finish = link_pb2.LinkSampleFinish(index=batch.index, reason=common_pb2.FINISH_REASON_STOP)
    logprobs = copy_logprobs(batch.logprobs, 0, num_tokens) if batch.logprobs is not None else None
    return TokenBatch(batch.index, batch.token_ids[:num_tokens], logprobs, finish)
