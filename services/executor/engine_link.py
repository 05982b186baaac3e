"""The engine's side of the links: protobuf frames to engine calls, step results to one StepOutput per link.

In the engine process only this module, `engine_load` and `engine_report` use protobuf messages; `engine` uses none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import MappingProxyType

import grpc

from scalellm.services.common.errors import StatusError
from scalellm.services.common.link import API_MINOR, check_submit, check_tokenizer, parse_client_frame, read_hello
from scalellm.services.executor.credit_window import Claim
from scalellm.services.executor.engine.engine import Engine
from scalellm.services.executor.engine.request import (
    AbortReason,
    EngineRequest,
    FinishReason,
    RequestFinish,
    RequestStatus,
    ResumedSample,
    SupersededError,
    TokenLogprobs,
)
from scalellm.services.executor.engine.sampling_params import InvalidRequestError, SamplingParams, check_num_logit_bias
from scalellm.services.executor.engine.step_result import LinkResult
from scalellm.services.executor.engine_load import load_to_wire
from scalellm.services.executor.frame_window import TakenFrames
from scalellm.services.executor.request_trace import TracedRequests
from scalellm.v1 import common_pb2, link_pb2

_REASONS = MappingProxyType(
    {
        FinishReason.STOP: common_pb2.FINISH_REASON_STOP,
        FinishReason.LENGTH: common_pb2.FINISH_REASON_LENGTH,
        FinishReason.CANCELLED: common_pb2.FINISH_REASON_CANCELLED,
        FinishReason.DEADLINE: common_pb2.FINISH_REASON_DEADLINE,
        FinishReason.ERROR: common_pb2.FINISH_REASON_ERROR,
    }
)
_FROM_WIRE_REASON = MappingProxyType({wire: reason for reason, wire in _REASONS.items()})
_ABORTS = MappingProxyType(
    {
        link_pb2.ABORT_REASON_STOP: AbortReason.STOP,
        link_pb2.ABORT_REASON_DEADLINE: AbortReason.DEADLINE,
    }
)
_CODES = MappingProxyType(
    {
        RequestStatus.CANCELLED: grpc.StatusCode.CANCELLED,
        RequestStatus.SUPERSEDED: grpc.StatusCode.ABORTED,
        RequestStatus.MOVED: grpc.StatusCode.UNAVAILABLE,
        RequestStatus.DEADLINE_EXCEEDED: grpc.StatusCode.DEADLINE_EXCEEDED,
        RequestStatus.INTERNAL: grpc.StatusCode.INTERNAL,
    }
)

_VALUES_PER_FRAME = 1 << 16
"""Most log-probabilities of prompts, alternatives included, in one frame. They take less than one megabyte of the 16
that a frame may have."""


def sampling_from_wire(wire: common_pb2.SamplingParams) -> SamplingParams:
    """Convert sampling parameters to the engine's. A field that is not set gets the engine's default. Raises
    InvalidRequestError if `logit_bias` has too many entries.
    """
    check_num_logit_bias(wire.logit_bias)
    values: dict[str, object] = {
        field.name: value for field, value in wire.ListFields() if field.name not in ("logit_bias", "stop_token_ids")
    }
    return SamplingParams(
        **values,  # type: ignore[arg-type]
        logit_bias={entry.token_id: entry.bias for entry in wire.logit_bias},
        stop_token_ids=frozenset(wire.stop_token_ids),
    )


class EngineLink:
    """The engine's end of one link: converts its frames, and grants its credits.

    Args:
        link: Number of the link; with a handle it makes the engine's request key.
        engine: The engine that runs its requests.
        renews: True if the client reports its demand. A client that does not is assumed to want the whole window.
        traced: Records the traced requests; None = traces are off.
    """

    def __init__(
        self,
        link: int,
        engine: Engine,
        *,
        renews: bool = True,
        traced: TracedRequests | None = None,
    ) -> None:
        self.link = link
        self._engine = engine
        self.demand = link_pb2.Renewal() if renews else None
        self._request_share = self._token_share = 1
        self._most_share = 1
        self.traced = traced
        self.taken = TakenFrames()
        self._seq = 0
        self._num_accepted = self._accepted_tokens = 0
        self._refused_tokens = 0
        self._num_refused = 0
        self._last_load: link_pb2.Load | None = None
        self._untold: link_pb2.StepTime | None = None

    def on_frame(self, payload: bytes, now: float, draining: bool) -> bytes | None:
        """Handle one ClientFrame. Returns a ServerFrame with the Finish if a request is refused, else None.

        Raises:
            StatusError: The frame violates the protocol, and the link must end.
        """
        frame = parse_client_frame(payload)
        match frame.WhichOneof("frame"):
            case "submit":
                return self._submit(frame.submit, now, draining)
            case "abort":
                self._abort(frame.abort)
                return None
            case "renewal":
                self.demand = frame.renewal
                return None
            case other:
                raise StatusError.invalid("frame", f"must be submit, abort or renewal after the hello, got {other}")

    def _abort(self, abort: link_pb2.Abort) -> None:
        key = (self.link, abort.handle)
        index = abort.index if abort.HasField("index") else None
        self._engine.abort(key, index, _ABORTS.get(abort.reason, AbortReason.CANCELLED))

    def _submit(self, submit: link_pb2.Submit, now: float, draining: bool) -> bytes | None:
        key = (self.link, submit.handle)
        for handle in submit.in_place_of:
            self._engine.give_back((self.link, handle), "the scheduler took the request back")
        if self._engine.has_request(key):  # a Finish for the new request would end the other one with this handle
            raise StatusError.invalid("handle", f"{submit.handle} is in use on this link")
        # A client that keeps to its credits cannot exceed this limit: credits that were moved to other links since it
        # was told still count, and so do those of ended requests, of which it may not have heard. So it may send the
        # one that comes in place of another without a credit.
        limit = self._granted_requests - self._request_share + self._most_share
        if self._num_accepted + self._num_refused >= limit:
            message = f"granted_requests: {limit} requests came, more than that were not granted"
            raise StatusError(grpc.StatusCode.RESOURCE_EXHAUSTED, message)
        charged_tokens = submit.charged_tokens if submit.HasField("charged_tokens") else len(submit.token_ids)
        try:
            check_submit(submit)
            if self.traced is not None:
                self.traced.on_submit(submit, now)
            if draining:
                raise StatusError.unavailable("the executor is draining and takes no new requests")
            self._engine.add(
                EngineRequest(
                    key=key,
                    request_id=submit.request_id,
                    prompt_token_ids=tuple(submit.token_ids),
                    sampling=sampling_from_wire(submit.sampling),
                    priority=submit.priority,
                    deadline=now + submit.time_remaining_ns / 1e9 if submit.HasField("time_remaining_ns") else None,
                    cache_salt=submit.cache_salt,
                    charged_tokens=charged_tokens,
                    execution_id=submit.execution_id,
                    attempt=submit.attempt,
                    grammar=submit.grammar,
                    prediction_token_ids=tuple(submit.prediction_token_ids),
                    resumed=tuple(
                        ResumedSample(sample.index, tuple(sample.token_ids), _FROM_WIRE_REASON.get(sample.finished))
                        for sample in submit.resumed
                    ),
                )
            )
        except InvalidRequestError as error:
            status = StatusError.invalid(error.field, error.message).to_link()
        except SupersededError as error:
            status = StatusError(grpc.StatusCode.ABORTED, str(error)).to_link()
        except StatusError as error:
            status = error.to_link()
        else:
            self._num_accepted += 1
            self._accepted_tokens += charged_tokens
            return None
        # A refused request never waits, so its credits are granted again at once.
        self._refused_tokens += charged_tokens
        self._num_refused += 1
        finish = link_pb2.Finish(handle=submit.handle, status=status)
        if self.traced is not None:
            self.traced.on_finish((finish,))
        return self._frame(link_pb2.StepOutput(finished=[finish], load=self.load(draining)))

    @property
    def _num_here(self) -> int:
        """Number of requests of this link that were accepted and have not ended."""
        return self._num_accepted - self._engine.link_credits(self.link).completed_requests

    @property
    def _granted_requests(self) -> int:
        """Cumulative number of requests that may be submitted since the link came up."""
        return self._engine.link_credits(self.link).completed_requests + self._num_refused + self._request_share

    def claims(self, request_window: int, token_window: int) -> tuple[Claim, Claim]:
        """Return this link's claims to the two windows of credits.

        Args:
            request_window: Most requests that may be in the engine at once, over all links.
            token_window: Most prompt tokens that may wait for their first step, over all links.

        Returns:
            The claims to the window of requests and to that of prompt tokens.
        """
        demand, credits = self.demand, self._engine.link_credits(self.link)
        waiting_tokens = self._accepted_tokens - credits.admitted_prefill_tokens
        if demand is None:
            return Claim(self._num_here, request_window), Claim(waiting_tokens, token_window)
        weight = max(1, demand.queued_tenants)
        return (
            Claim(self._num_here, min(demand.queued_requests, request_window), weight),
            Claim(waiting_tokens, min(demand.queued_tokens, token_window), weight),
        )

    def grant(self, requests: int, tokens: int) -> bool:
        """Set the requests and waiting prompt tokens that this link may hold. Returns whether either has changed."""
        before = (self._request_share, self._token_share)
        self._request_share, self._token_share = requests, tokens
        self._most_share = max(self._most_share, requests)
        return before != (requests, tokens)

    def load(self, draining: bool) -> link_pb2.Load:
        """Return the engine's load with this link's credits."""
        load = load_to_wire(self._engine.load(), draining)
        credits = self._engine.link_credits(self.link)
        load.granted_prefill_tokens = credits.admitted_prefill_tokens + self._refused_tokens + self._token_share
        load.granted_requests = self._granted_requests
        if self._untold is not None:
            load.step_time.CopyFrom(self._untold)
        return load

    def tell(self, step_time: link_pb2.StepTime) -> None:
        """Send the model of step times with the next load."""
        self._untold = step_time

    def load_frame(self, draining: bool) -> bytes | None:
        """Return a frame with only the load, or None if the load has not changed and the link has no requests.

        While the link has requests, an unchanged load is sent too, as a sign of life: a long prompt takes many steps
        without output, and the scheduler considers an executor dead that has work and sends nothing.
        """
        load = self.load(draining)
        if not self._num_here and load == self._last_load:
            return None
        return self._frame(link_pb2.StepOutput(load=load))

    def welcome_frame(self, info: link_pb2.Welcome, draining: bool) -> bytes:
        """Return the Welcome that accepts the link, as one serialised ServerFrame."""
        welcome = link_pb2.Welcome()
        welcome.CopyFrom(info)
        welcome.api_minor = API_MINOR
        welcome.load.CopyFrom(self.load(draining))
        self._untold = None
        return link_pb2.ServerFrame(welcome=welcome).SerializeToString()

    def step_frames(self, result: LinkResult, draining: bool) -> list[bytes]:
        """Return the results of a step for this link, as serialised ServerFrames.

        It is one frame, unless prompts have so many log-probabilities that these go before it in frames of their own.
        """
        *full, last = _divide_prompt_logprobs(result.prompt_logprobs)
        frames = [
            self._frame(link_pb2.StepOutput(prompt_logprobs=entries, load=self.load(draining))) for entries in full
        ]
        frames.append(self._step_frame(result, last, draining))
        return frames

    def _step_frame(self, result: LinkResult, prompt_logprobs: list[link_pb2.LinkLogprobs], draining: bool) -> bytes:
        finished = [_finish(finish) for finish in result.finished]
        if self.traced is not None:
            self.traced.on_finish(finished)
        return self._frame(
            link_pb2.StepOutput(
                handles=result.handles,
                indices=result.indices,
                offsets=result.offsets,
                counts=result.counts,
                token_ids=result.token_ids,
                logprobs=[_logprobs(entry) for entry in result.logprobs],
                prompt_logprobs=prompt_logprobs,
                finished_samples=[
                    link_pb2.LinkSampleFinish(
                        handle=sample.key[1],
                        index=sample.index,
                        reason=_REASONS[sample.reason],
                        stop_token_id=sample.stop_token_id,
                    )
                    for sample in result.samples_finished
                ],
                finished=finished,
                load=self.load(draining),
            )
        )

    def _frame(self, step: link_pb2.StepOutput) -> bytes:
        self._seq += 1
        step.seq = self._seq
        frame = link_pb2.ServerFrame(step=step).SerializeToString()
        self._last_load = step.load
        self._last_load.ClearField("step_time")
        self._untold = None
        return frame


def accept_hello(payload: bytes, info: link_pb2.Welcome) -> link_pb2.Hello:
    """Parse a link's first frame and return its Hello. Raises StatusError to refuse the link."""
    hello = read_hello(payload)
    check_tokenizer(hello, info)
    return hello


def _logprobs(entry: TokenLogprobs) -> link_pb2.LinkLogprobs:
    values = common_pb2.TokenLogprobs(logprobs=entry.logprobs, num_top=entry.num_top)
    if entry.num_top:
        for pairs in entry.top_logprobs:
            # Each token has as many places as were asked for, also the first of a prompt, which has no alternatives:
            # parts of a prompt are put together column by column.
            padded = [*pairs, *[(0, 0.0)] * (entry.num_top - len(pairs))]
            values.top_token_ids.extend(token for token, _ in padded)
            values.top_logprobs.extend(value for _, value in padded)
    return link_pb2.LinkLogprobs(handle=entry.key[1], index=entry.index, offset=entry.offset, values=values)


def _divide_prompt_logprobs(parts: Sequence[TokenLogprobs]) -> list[list[link_pb2.LinkLogprobs]]:
    """Divide log-probabilities of prompts among one or more frames, in order. The last list may be empty."""
    frames: list[list[link_pb2.LinkLogprobs]] = [[]]
    room = _VALUES_PER_FRAME
    for part in parts:
        per_token = 1 + part.num_top
        start = 0
        while start < len(part.logprobs):
            if room < per_token:
                frames.append([])
                room = _VALUES_PER_FRAME
            stop = min(start + room // per_token, len(part.logprobs))
            room -= (stop - start) * per_token
            frames[-1].append(
                _logprobs(
                    replace(
                        part,
                        offset=part.offset + start,
                        logprobs=part.logprobs[start:stop],
                        top_logprobs=part.top_logprobs[start:stop],
                    )
                )
            )
            start = stop
    return frames


def _finish(finish: RequestFinish) -> link_pb2.Finish:
    usage, timings = finish.usage, finish.timings
    code, status = _CODES.get(finish.status), None
    if finish.status is RequestStatus.INVALID:
        status = StatusError.invalid("structured_output", finish.message).to_link()
    elif code is not None:
        status = StatusError(code, finish.message).to_link()
    return link_pb2.Finish(
        handle=finish.key[1],
        status=status,
        usage=common_pb2.Usage(
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            cached_tokens=usage.cached_tokens,
            num_preemptions=usage.num_preemptions,
            num_resumed=usage.num_resumed,
            accepted_prediction_tokens=usage.accepted_drafts,
            rejected_prediction_tokens=usage.rejected_drafts,
        ),
        timings=link_pb2.HopTimings(
            executor_total_ns=_ns(timings.total),
            queue_ns=_ns(timings.queue),
            prefill_ns=_ns(timings.prefill),
            decode_ns=_ns(timings.decode),
            preempted_ns=_ns(timings.preempted),
        ),
        moved=finish.status is RequestStatus.MOVED,
    )


def _ns(seconds: float) -> int:
    return max(0, round(seconds * 1e9))
