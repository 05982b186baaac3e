"""A worker's link to one scheduler, shared by all its requests there."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import grpc

from scalellm.services.common.errors import StatusError
from scalellm.services.common.link import (
    PLAINTEXT,
    Handles,
    LinkClient,
    LinkDialer,
    LinkTraffic,
    ModelIdentity,
    token_runs,
)
from scalellm.services.tokenizer.token_receiver import TokenReceiver
from scalellm.v1 import link_pb2, scheduler_pb2

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class LinkCounts:
    """Counts over all links of a worker.

    Attributes:
        traffic: Frames and bytes.
        tokens: Tokens that came for requests that run here.
        discarded_tokens: Tokens that came for requests that had ended here.
    """

    traffic: LinkTraffic = field(default_factory=LinkTraffic)
    tokens: int = 0
    discarded_tokens: int = 0


class LinkOwner(Protocol):
    """The receiver of a link's events."""

    def link_changed(self, link: SchedulerLink) -> None:
        """Handle a link that began or ceased to take requests."""

    def request_finished(self, link: SchedulerLink, receiver: TokenReceiver, finish: link_pb2.Finish, now: int) -> None:
        """Handle the scheduler's Finish of a request; `now` in nanoseconds of the monotonic clock."""

    def link_lost(self, link: SchedulerLink, receivers: list[TokenReceiver], error: StatusError) -> None:
        """Handle a link that broke or could not be made, with the requests that were on it."""


class SchedulerLink:
    """Sends requests to one scheduler, and passes results to their receivers. Implements LinkHandler.

    Handles belong to one connection and end with it, so late frames of a scheduler that was given up reach no request.

    Args:
        address: host:port of the scheduler.
        hello: First frame of each connection.
        owner: Handles the link's events.
        counts: Counts of messages in both directions.
        silence_limit: Seconds without a frame, while requests run, after which the scheduler counts as dead. It sends
            one every few seconds, whatever its executors do.
        dialer: Dialer of the connection.
        clock: Monotonic nanoseconds.

    Attributes:
        address: See above.
        dialer: See above.
        why_down: Reason why no requests can be sent, while that is so.
        drop_when_down: True if no listed name resolves to the address any more.
    """

    def __init__(
        self,
        address: str,
        hello: link_pb2.Hello,
        owner: LinkOwner,
        *,
        counts: LinkCounts,
        silence_limit: float = 30.0,
        dialer: LinkDialer = PLAINTEXT,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.address = address
        self.dialer = dialer
        self._client = LinkClient(
            address,
            scheduler_pb2.DESCRIPTOR.services_by_name["Scheduler"].methods_by_name["Connect"],
            hello,
            handler=self,
            dialer=dialer,
            silence_limit=silence_limit,
            traffic=counts.traffic,
            is_busy=lambda: bool(self._handles),
        )
        self._model = hello.model
        self._owner = owner
        self._counts = counts
        self._clock = clock
        self._welcome: link_pb2.Welcome | None = None
        self._is_draining = False
        self.why_down = StatusError.unavailable("not connected yet")
        self.drop_when_down = False
        self._handles: Handles[TokenReceiver] = Handles()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Connect, and reconnect whenever the link breaks."""
        self._task = asyncio.create_task(self._client.run(), name=f"scheduler {self.address}")

    async def stop(self) -> None:
        """Close the link."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    @property
    def is_up(self) -> bool:
        """True while the link is connected."""
        return self._welcome is not None

    @property
    def welcome(self) -> link_pb2.Welcome | None:
        """The scheduler's Welcome; None while it takes no requests: the link is down, or it is leaving."""
        return None if self._is_draining else self._welcome

    @property
    def identity(self) -> ModelIdentity | None:
        """The model that it serves; None while the link is down."""
        return ModelIdentity.of(self._welcome) if self._welcome is not None else None

    @property
    def num_handles(self) -> int:
        """Number of requests whose Finish has not arrived."""
        return len(self._handles)

    def submit(self, submit: link_pb2.Submit, receiver: TokenReceiver) -> int:
        """Send a request; sets its handle and returns it. Only while there is a welcome."""
        submit.handle = self._handles.take(receiver)
        self._client.submit(submit)
        return submit.handle

    def stop_sample(self, handle: int, index: int) -> None:
        """Ask the scheduler to end a sample in which a stop string was found."""
        self._client.abort(handle, link_pb2.ABORT_REASON_STOP, index)

    def release(self, handle: int, reason: link_pb2.AbortReason) -> None:
        """Abort a running request whose results are no longer wanted."""
        self._handles.release(handle)
        if self._client.withdraw(handle):
            self._handles.finish(handle)  # no Finish comes, as the scheduler has not heard of it
        else:
            self._client.abort(handle, reason)

    def stop_submitting(self, why: str) -> None:
        """Stop sending new requests to the scheduler until the link comes up again."""
        if not self._is_draining:
            self._is_draining = True
            self.why_down = StatusError.unavailable(f"{self.address} {why}")
            self._owner.link_changed(self)

    # LinkHandler

    def on_up(self, welcome: link_pb2.Welcome) -> None:
        """Take over the scheduler's Welcome: the link is up."""
        if not welcome.model:
            raise StatusError.unavailable("the scheduler has no executor yet")
        if self._model not in ("", welcome.model):  # it is of a version that has one model
            message = f"{self.address} serves {welcome.model!r}, not {self._model!r}"
            raise StatusError(grpc.StatusCode.FAILED_PRECONDITION, message)
        self._welcome = welcome
        self._is_draining = False
        # Not called directly: the client can send only after this has returned.
        asyncio.get_running_loop().call_soon(self._owner.link_changed, self)

    def on_step(self, step: link_pb2.StepOutput) -> None:
        """Distribute a frame's results to the receivers."""
        now = self._clock()
        get = self._handles.get
        for entry in step.logprobs:
            if (receiver := get(entry.handle)) is not None:
                receiver.on_logprobs(entry)
        for entry in step.prompt_logprobs:
            if (receiver := get(entry.handle)) is not None:
                receiver.on_prompt_logprobs(entry)
        num_discarded = 0
        for handle, index, offset, token_ids in token_runs(step):
            if (receiver := get(handle)) is not None:
                receiver.on_tokens(index, offset, token_ids, now)
            else:
                num_discarded += len(token_ids)
        self._counts.tokens += len(step.token_ids) - num_discarded
        self._counts.discarded_tokens += num_discarded
        for sample_finish in step.finished_samples:
            if (receiver := get(sample_finish.handle)) is not None:
                receiver.on_sample_finish(sample_finish)
        # Before the Finishes are handled, because a request that was given back moves to another scheduler.
        if step.load.draining:
            self.stop_submitting("is shutting down")
        for finish in step.finished:
            if (receiver := self._handles.finish(finish.handle)) is not None:
                self._owner.request_finished(self, receiver, finish, now)

    def on_down(self, error: StatusError) -> None:
        """Handle the loss of the link: report its requests to the owner, which moves them."""
        if error.code is grpc.StatusCode.FAILED_PRECONDITION and error.message != self.why_down.message:
            _log.error("scheduler %s refuses this service: %s", self.address, error.message)
        self._welcome = None
        self._is_draining = False
        self.why_down = error
        self._owner.link_lost(self, self._handles.clear(), error)
