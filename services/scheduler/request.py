"""One request: its state, and its two sides."""

from __future__ import annotations

import asyncio
import enum
from typing import TYPE_CHECKING

from scalellm.services.common.errors import StatusError
from scalellm.services.common.link import LOWEST_PRIORITY, check_submit, tenant_weight
from scalellm.services.scheduler.admission_queue import QueueFullError
from scalellm.services.scheduler.client_side import ClientSide
from scalellm.services.scheduler.executor_side import ExecutorSide
from scalellm.services.scheduler.request_times import RequestTimes
from scalellm.v1 import common_pb2, link_pb2

if TYPE_CHECKING:
    from scalellm.services.scheduler.client_link import ClientLink
    from scalellm.services.scheduler.replica_link import ReplicaLink
    from scalellm.services.scheduler.request_trace import RequestTrace


class RequestState(enum.Enum):
    """QUEUED -> RUNNING -> ENDED; RUNNING -> QUEUED when its executor is lost or gives it back; QUEUED -> ENDED when it
    is given up.
    """

    QUEUED = enum.auto()
    RUNNING = enum.auto()
    ENDED = enum.auto()


class Request:
    """A Submit of a client link, from its arrival to its Finish.

    Args:
        link: The client link it came on.
        submit: The Submit; owned and changed by this object.
        arrival: Its place in the order of arrival among all requests.
        now: Time of arrival, in monotonic seconds.

    Attributes:
        client: The client's side.
        executor: The executor's side.
        times: Its times.
        deadline: Latest time of its end, in monotonic seconds; None = never.
        timer: Rings at the deadline.
        trace: Its spans; None = it is not traced.
    """

    __slots__ = (
        "arrival",
        "client",
        "deadline",
        "executor",
        "num_prompt_tokens",
        "priority",
        "session_id",
        "state",
        "submit",
        "tenant",
        "tenant_weight",
        "timer",
        "times",
        "trace",
    )

    def __init__(self, link: ClientLink, submit: link_pb2.Submit, arrival: int, now: float) -> None:
        self.submit = submit
        self.arrival = arrival
        self.priority: int = submit.priority
        self.tenant: bytes = submit.tenant or submit.cache_salt
        self.tenant_weight = tenant_weight(submit)
        self.session_id: str = submit.session_id
        self.deadline = now + submit.time_remaining_ns / 1e9 if submit.HasField("time_remaining_ns") else None
        self.timer: asyncio.TimerHandle | None = None
        self.trace: RequestTrace | None = None
        self.state = RequestState.QUEUED
        self.client = ClientSide(link, submit)
        self.executor = ExecutorSide()
        self.times = RequestTimes(now)
        self.num_prompt_tokens = len(submit.token_ids)

    def check(self) -> None:
        """Raise StatusError INVALID_ARGUMENT for a Submit that no executor can take, and set the progress to the tokens
        of its `resumed`.
        """
        check_submit(self.submit)
        self.client.progress.start_at(self.submit.resumed)
        self.executor.num_resumed = self.executor.num_charged = self.client.progress.num_tokens

    @property
    def num_rows(self) -> int:
        """Rows of an executor that the request needs: one for each sample that has not ended."""
        return self.client.progress.ended.count(common_pb2.FINISH_REASON_UNSPECIFIED)

    @property
    def needs_grammars(self) -> bool:
        """True if only an executor that takes grammars can run it."""
        return bool(self.submit.grammar)

    @property
    def num_new_tokens(self) -> int:
        """Output tokens since the last dispatch."""
        return self.client.progress.num_tokens - self.executor.num_resumed

    @property
    def max_len(self) -> int:
        """Context length that the request needs, in tokens: the prompt plus `max_tokens`, or plus one token more than
        so far if the client set no limit.
        """
        sampling = self.submit.sampling
        longest = sampling.max_tokens if sampling.HasField("max_tokens") else 1 + max(map(len, self.client.emitted))
        return self.num_prompt_tokens + longest

    def start(self, replica: ReplicaLink, handle: int, now: float) -> None:
        """Record that the request was sent to an executor under this handle."""
        assert self.state is RequestState.QUEUED
        self.state = RequestState.RUNNING
        self.executor.dispatches += 1
        self.executor.replica = replica
        self.executor.handle = handle
        self.executor.num_rows = self.num_rows
        self.executor.is_recalled = False
        self.times.leave_queue(now)

    def requeue(self, *, lost: bool) -> None:
        """Record that the request is queued again; lost: True if the time since its dispatch counts as failover."""
        assert self.state is RequestState.RUNNING
        self.state = RequestState.QUEUED
        self.executor.replica = None
        self.executor.session_wait_until = None
        self.times.come_back(lost=lost)

    def end(self, now: float) -> None:
        """Record that the request got its Finish, and cancel its timer."""
        assert self.state is not RequestState.ENDED
        if self.state is RequestState.QUEUED:
            self.times.leave_queue(now)
        self.state = RequestState.ENDED
        self.executor.replica = None
        if self.timer is not None:
            self.timer.cancel()

    def make_submit(self, now: float, charged_tokens: int, *, ahead: bool = False) -> link_pb2.Submit:
        """Make the Submit for an executor, with the tokens emitted so far and the remaining time. The caller sets the
        handle.

        Args:
            now: Monotonic seconds.
            charged_tokens: Prompt tokens by which the request reduces the executor's credit.
            ahead: True if it passes the requests of its own priority that wait at the executor.
        """
        submit, client = self.submit, self.client
        submit.charged_tokens = self.executor.charged_tokens = charged_tokens
        submit.priority = max(self.priority - ahead, LOWEST_PRIORITY)
        if self.deadline is not None:
            submit.time_remaining_ns = max(0, int((self.deadline - now) * 1e9))
        self.executor.num_resumed = client.progress.num_tokens
        client.progress.resume(submit)
        return submit

    def make_finish(self, error: StatusError | None, *, moved: bool = False) -> link_pb2.Finish:
        """Make a Finish in place of an executor's; moved: with UNAVAILABLE, the request may go on elsewhere."""
        return link_pb2.Finish(
            status=error.to_link() if error is not None else None,
            usage=common_pb2.Usage(
                prompt_tokens=self.num_prompt_tokens,
                completion_tokens=self.client.progress.num_tokens,
                num_resumed=self.executor.num_resumed,
            ),
            moved=moved,
            tenant_full_ns=int(error.lasts * 1e9) if isinstance(error, QueueFullError) else 0,
        )
