"""The worker's one link to the scheduler, shared by all its requests."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

import grpc

from scalellm.v1 import link_pb2, scheduler_pb2
from services.common.errors import StatusError
from services.common.link import API_MINOR, PLAINTEXT, LinkClient, LinkDialer, LinkTraffic
from services.tokenizer.token_receiver import TokenReceiver

_log = logging.getLogger(__name__)

_RETRY_AFTER = 1.0
_MAX_HANDLE = 2**32 - 1


class SchedulerLink:
    """Hands requests to the scheduler and what comes back to their receivers. A LinkHandler.

    Args:
        address: host:port of the scheduler.
        client_id: Names this incarnation of the worker.
        tokenizer_sha256: Of the tokenizer in use: a scheduler whose executors have another one refuses the link.
        silence_limit: Seconds without a frame, while requests run, after which the scheduler counts as dead. It sends
            one every few seconds, whatever its executors do.
        dialer: How to connect.
        clock: Monotonic nanoseconds.

    Attributes:
        num_tokens: Tokens that came for requests that run here.
        num_discarded_tokens: Tokens that came for requests that had ended here.
    """

    def __init__(
        self,
        address: str,
        client_id: str,
        tokenizer_sha256: bytes,
        *,
        silence_limit: float = 30.0,
        dialer: LinkDialer = PLAINTEXT,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        hello = link_pb2.Hello(client_id=client_id, api_minor=API_MINOR, tokenizer_sha256=tokenizer_sha256)
        self._client = LinkClient(
            address,
            scheduler_pb2.DESCRIPTOR.services_by_name["Scheduler"].methods_by_name["Connect"],
            hello,
            handler=self,
            dialer=dialer,
            silence_limit=silence_limit,
            is_busy=lambda: bool(self._receivers),
        )
        self._clock = clock
        self._welcome: link_pb2.Welcome | None = None
        self._vocab_size = 0
        self._draining = False
        self._changed = asyncio.Event()
        self._why_down = StatusError.unavailable("not connected yet")
        # None: released here, but the handle must not be used again before its Finish.
        self._receivers: dict[int, TokenReceiver | None] = {}
        self._last_handle = 0
        self.num_tokens = 0
        self.num_discarded_tokens = 0

    async def run(self) -> None:
        """Keep the link up until cancelled."""
        await self._client.run()

    @property
    def welcome(self) -> link_pb2.Welcome | None:
        """What the scheduler said of the model; None while the link is down or the scheduler is leaving."""
        return None if self._draining else self._welcome

    @property
    def vocab_size(self) -> int:
        """Tokens that the model knows, by the last welcome; 0 before the first."""
        return self._vocab_size

    @property
    def traffic(self) -> LinkTraffic:
        """What went over the link."""
        return self._client.traffic

    @property
    def num_handles(self) -> int:
        """Requests whose Finish has not come."""
        return len(self._receivers)

    async def wait_up(self, limit: float) -> link_pb2.Welcome:
        """Return the welcome, waiting up to `limit` seconds for one. Raises StatusError."""
        if self.welcome is None:
            try:
                async with asyncio.timeout(limit):
                    while self.welcome is None:
                        self._changed.clear()
                        await self._changed.wait()
            except TimeoutError:
                raise self._make_outage() from None
        assert self.welcome is not None
        return self.welcome

    def submit(self, submit: link_pb2.Submit, *, min_tokens: int = 1) -> TokenReceiver:
        """Send a request; sets its handle. `release` must follow. Raises StatusError when the link is down."""
        if self.welcome is None:
            raise self._make_outage()
        handle = self._next_handle()
        sampling = submit.sampling
        receiver = TokenReceiver(
            handle,
            sampling.n,
            logprobs=sampling.HasField("logprobs"),
            num_prompt_logprobs=len(submit.token_ids) if sampling.HasField("prompt_logprobs") else 0,
            min_tokens=min_tokens,
        )
        submit.handle = handle
        self._receivers[handle] = receiver
        self._client.submit(submit)
        return receiver

    def stop_sample(self, receiver: TokenReceiver, index: int) -> None:
        """A stop string ended a sample."""
        if self._receivers.get(receiver.handle) is receiver:
            self._client.abort(receiver.handle, link_pb2.ABORT_REASON_STOP, index)

    def release(self, receiver: TokenReceiver, reason: link_pb2.AbortReason) -> None:
        """Nobody takes from the receiver any more; if the request still runs it is aborted for `reason`."""
        if self._receivers.get(receiver.handle) is receiver:
            self._receivers[receiver.handle] = None
            self._client.abort(receiver.handle, reason)

    # LinkHandler

    def on_up(self, welcome: link_pb2.Welcome) -> None:
        """The scheduler welcomed us."""
        if not welcome.model:
            raise StatusError.unavailable("the scheduler has no executor yet")
        self._draining = False
        self._welcome = welcome
        self._vocab_size = welcome.vocab_size
        self._changed.set()

    def on_step(self, step: link_pb2.StepOutput) -> None:
        """Distribute a frame."""
        # Lists: protobuf's own columns make an object per access, which costs more than all the rest of the loop.
        handles, indices, offsets, counts = step.handles[:], step.indices[:], step.offsets[:], step.counts[:]
        token_ids = step.token_ids[:]
        now = self._clock()
        receivers = self._receivers
        for entry in step.logprobs:
            if (receiver := receivers.get(entry.handle)) is not None:
                receiver.on_logprobs(entry)
        for entry in step.prompt_logprobs:
            if (receiver := receivers.get(entry.handle)) is not None:
                receiver.on_prompt_logprobs(entry)
        start = num_discarded = 0
        for handle, index, offset, count in zip(handles, indices, offsets, counts, strict=True):
            end = start + count
            if (receiver := receivers.get(handle)) is not None:
                receiver.on_tokens(index, offset, token_ids[start:end], now)
            else:
                num_discarded += count
            start = end
        self.num_tokens += len(token_ids) - num_discarded
        self.num_discarded_tokens += num_discarded
        for sample_finish in step.finished_samples:
            if (receiver := receivers.get(sample_finish.handle)) is not None:
                receiver.on_sample_finish(sample_finish)
        for finish in step.finished:
            if (receiver := receivers.pop(finish.handle, None)) is not None:
                receiver.on_finish(finish, now)
        if step.load.draining and not self._draining:
            self._draining = True
            self._why_down = StatusError.unavailable("it is shutting down")

    def on_down(self, error: StatusError) -> None:
        """All requests on the link are lost."""
        if error.code is grpc.StatusCode.FAILED_PRECONDITION and error.message != self._why_down.message:
            _log.error("the scheduler refuses this service, no request can be served: %s", error.message)
        self._welcome = None
        self._why_down = error
        self.fail_all(f"the link to the scheduler broke: {error.message}")

    def fail_all(self, why: str) -> None:
        """End every running request with UNAVAILABLE. The scheduler ends them, too, once the link is closed."""
        receivers, self._receivers = self._receivers, {}
        for receiver in receivers.values():
            if receiver is not None:
                receiver.fail(StatusError.unavailable(why, _RETRY_AFTER))

    def _make_outage(self) -> StatusError:
        if self._why_down.code is grpc.StatusCode.FAILED_PRECONDITION:
            return StatusError(grpc.StatusCode.FAILED_PRECONDITION, self._why_down.message)
        return StatusError.unavailable(f"the scheduler cannot be reached: {self._why_down.message}", _RETRY_AFTER)

    def _next_handle(self) -> int:
        while True:
            self._last_handle = self._last_handle % _MAX_HANDLE + 1
            if self._last_handle not in self._receivers:
                return self._last_handle
