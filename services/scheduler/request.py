"""One request: its state, its emitted tokens, where its time went."""

from __future__ import annotations

import asyncio
import enum
from typing import TYPE_CHECKING

import grpc

from scalellm.v1 import common_pb2, link_pb2
from services.common.errors import StatusError
from services.common.link import MAX_SAMPLES, check_submit

if TYPE_CHECKING:
    from services.scheduler.client_link import ClientLink
    from services.scheduler.replica_link import ReplicaLink
    from services.scheduler.request_trace import RequestTrace

_ENDS = {
    link_pb2.ABORT_REASON_STOP: common_pb2.FINISH_REASON_STOP,
    link_pb2.ABORT_REASON_DEADLINE: common_pb2.FINISH_REASON_DEADLINE,
}


class RequestState(enum.Enum):
    """QUEUED -> RUNNING -> ENDED; RUNNING -> QUEUED when the executor is lost; QUEUED -> ENDED when it is given up."""

    QUEUED = enum.auto()
    RUNNING = enum.auto()
    ENDED = enum.auto()


class Request:
    """A Submit of a client link, from its arrival to its Finish.

    Times are monotonic seconds. The life of a request is divided without gaps into admission (waiting, or under way to
    executors that sent it back), failover (on executors that died, and until it ran again) and its last executor.

    Args:
        link: The client link it came on.
        submit: What came; owned and changed by this object.
        arrival: Its place among all requests.
        now: Time of arrival.
    """

    __slots__ = (
        "_admission",
        "_failover",
        "_lost",
        "_since",
        "accepted_at",
        "arrival",
        "awaits_affinity",
        "cancelled",
        "deadline",
        "deaths",
        "dispatches",
        "emitted",
        "ended_samples",
        "handle",
        "hashes",
        "link",
        "logprobs_passed",
        "num_prompt_tokens",
        "num_resumed",
        "priority",
        "prompt_logprobs_passed",
        "refused_by",
        "replica",
        "replica_handle",
        "session_address",
        "session_id",
        "session_wait_until",
        "state",
        "stopping_samples",
        "submit",
        "tenant",
        "timer",
        "trace",
        "turn",
    )

    def __init__(self, link: ClientLink, submit: link_pb2.Submit, arrival: int, now: float) -> None:
        self.link = link
        self.handle: int = submit.handle
        self.submit = submit
        self.arrival = arrival
        self.priority: int = submit.priority
        self.tenant: bytes = submit.tenant or submit.cache_salt
        self.turn = 0
        self.num_prompt_tokens = len(submit.token_ids)
        self.session_id: str = submit.session_id
        self.deadline = now + submit.time_remaining_ns / 1e9 if submit.HasField("time_remaining_ns") else None
        self.timer: asyncio.TimerHandle | None = None
        self.trace: RequestTrace | None = None
        self.state = RequestState.QUEUED

        num_samples = submit.sampling.n if submit.sampling.HasField("n") else 1
        self.emitted: list[list[int]] = [[] for _ in range(min(num_samples, MAX_SAMPLES))]
        self.ended_samples: dict[int, common_pb2.FinishReason] = {}
        self.stopping_samples: dict[int, common_pb2.FinishReason] = {}
        self.logprobs_passed: dict[int, int] = {}
        self.prompt_logprobs_passed = 0
        self.cancelled: StatusError | None = None

        self.replica: ReplicaLink | None = None
        self.replica_handle = 0
        self.deaths = 0
        self.dispatches = 0
        self.num_resumed = 0
        self.refused_by: dict[str, str] = {}

        self.hashes: list[int] = []
        self.session_address: str | None = None
        self.session_wait_until: float | None = None
        self.awaits_affinity = False

        self.accepted_at = now
        self._since = now
        self._lost = False
        self._admission = 0.0
        self._failover = 0.0

    def check(self) -> None:
        """Raise INVALID_ARGUMENT for what no executor can take, and go on from what was resumed."""
        check_submit(self.submit)
        for sample in self.submit.resumed:
            self.emitted[sample.index] = list(sample.token_ids)
            self.logprobs_passed[sample.index] = len(sample.token_ids)
            if sample.finished:
                self.ended_samples[sample.index] = sample.finished
        self.num_resumed = self.num_emitted

    def start(self, replica: ReplicaLink, replica_handle: int, now: float) -> None:
        """It was sent to an executor."""
        assert self.state is RequestState.QUEUED
        self.state = RequestState.RUNNING
        self.dispatches += 1
        self.replica = replica
        self.replica_handle = replica_handle
        self._close_wait(now)
        self._since = now

    def requeue(self, *, lost: bool) -> None:
        """It waits again: its executor is lost, or sent it back."""
        assert self.state is RequestState.RUNNING
        self.state = RequestState.QUEUED
        self.replica = None
        self.session_wait_until = None
        # The time since the dispatch, and until the next one, counts as failover or admission from here.
        self._lost = lost

    def end(self, now: float) -> None:
        """It got its Finish."""
        assert self.state is not RequestState.ENDED
        if self.state is RequestState.QUEUED:
            self._close_wait(now)
        self.state = RequestState.ENDED
        self.replica = None
        if self.timer is not None:
            self.timer.cancel()

    def _close_wait(self, now: float) -> None:
        if self._lost:
            self._failover += now - self._since
        else:
            self._admission += now - self._since

    @property
    def admission_seconds(self) -> float:
        """Time in the admission queue so far."""
        return self._admission

    @property
    def num_emitted(self) -> int:
        """Tokens passed to the client, over all samples."""
        return sum(map(len, self.emitted))

    @property
    def max_len(self) -> int:
        """Tokens that an executor must hold for it: the prompt and the longest output, or one more token than so far
        where the client left the output's length to the executor.
        """
        sampling = self.submit.sampling
        longest = sampling.max_tokens if sampling.HasField("max_tokens") else 1 + max(map(len, self.emitted))
        return self.num_prompt_tokens + longest

    @property
    def all_samples_ended(self) -> bool:
        """Whether only the Finish is missing."""
        return len(self.ended_samples) == len(self.emitted)

    def request_end(self, abort: link_pb2.Abort) -> None:
        """Remember an Abort of the client, in case the executor dies before it answers."""
        if abort.HasField("index"):
            if abort.index < len(self.emitted) and abort.index not in self.ended_samples:
                self.stopping_samples[abort.index] = _ENDS.get(abort.reason, common_pb2.FINISH_REASON_CANCELLED)
        elif abort.reason == link_pb2.ABORT_REASON_STOP:
            for index in range(len(self.emitted)):
                if index not in self.ended_samples:
                    self.stopping_samples[index] = common_pb2.FINISH_REASON_STOP
        elif abort.reason == link_pb2.ABORT_REASON_DEADLINE:
            self.cancelled = StatusError(grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline passed")
        else:
            self.cancelled = StatusError(grpc.StatusCode.CANCELLED, "the client cancelled the request")

    def settle_stopping(self) -> None:
        """End, towards the client, the samples that it wanted to end: no executor will answer to that any more."""
        for index, reason in sorted(self.stopping_samples.items()):
            self.ended_samples[index] = reason
            self.link.add_sample_finish(link_pb2.LinkSampleFinish(handle=self.handle, index=index, reason=reason))
        self.stopping_samples.clear()

    def make_submit(self, handle: int, now: float, charged_tokens: int) -> link_pb2.Submit:
        """The Submit for an executor, with what was emitted so far and the time that is left."""
        submit = self.submit
        submit.handle = handle
        submit.charged_tokens = charged_tokens
        if self.deadline is not None:
            submit.time_remaining_ns = max(0, int((self.deadline - now) * 1e9))
        del submit.resumed[:]
        self.num_resumed = self.num_emitted
        for index, token_ids in enumerate(self.emitted):
            if token_ids or index in self.ended_samples:
                finished = self.ended_samples.get(index, common_pb2.FINISH_REASON_UNSPECIFIED)
                submit.resumed.add(index=index, token_ids=token_ids, finished=finished)
        if self.prompt_logprobs_passed >= self.num_prompt_tokens:
            submit.sampling.ClearField("prompt_logprobs")
        return submit

    def make_finish(self, error: StatusError | None) -> link_pb2.Finish:
        """A Finish where no executor sends one."""
        return link_pb2.Finish(
            status=error.to_link() if error is not None else None,
            usage=common_pb2.Usage(
                prompt_tokens=self.num_prompt_tokens,
                completion_tokens=self.num_emitted,
                num_resumed=self.num_resumed,
            ),
        )

    def add_timings(self, timings: link_pb2.HopTimings, now: float) -> None:
        """Fill in the scheduler's part, after `end`."""
        timings.scheduler_total_ns = int((now - self.accepted_at) * 1e9)
        timings.admission_ns = int(self._admission * 1e9)
        timings.failover_ns = int(self._failover * 1e9)
