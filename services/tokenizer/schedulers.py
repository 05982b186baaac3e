"""The schedulers of a worker: the choice of one for each request, and the failover when one is lost."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Callable, Sequence

import grpc

from scalellm.services.common.addresses import is_ip_address
from scalellm.services.common.errors import StatusError
from scalellm.services.common.link import API_MINOR, PLAINTEXT, LinkDialer
from scalellm.services.tokenizer.full_queues import FullQueues
from scalellm.services.tokenizer.running_request import Move, RunningRequest
from scalellm.services.tokenizer.scheduler_discovery import SchedulerDiscovery
from scalellm.services.tokenizer.scheduler_link import LinkCounts, SchedulerLink
from scalellm.services.tokenizer.token_receiver import TokenReceiver
from scalellm.v1 import link_pb2

_log = logging.getLogger(__name__)

_RETRY_AFTER = 1.0

_MOST_LOSSES = 5
"""Number of schedulers lost in a row under a request, without a new token, with which it ends as their likely cause."""


class Schedulers:
    """A link to each scheduler, and the requests that run on them. Implements LinkOwner and SchedulerSet.

    A request whose scheduler is lost, or gives it back, goes on with another one, or with the same one once that is
    back. Its receiver notices only a pause.

    Args:
        names: host:port of each; a name with several addresses stands for all of them.
        client_id: Names this incarnation of the worker.
        tokenizer_sha256: Digest of the tokenizer in use: a scheduler whose executors have another one refuses the link.
        silence_limit: Seconds without a frame, while requests run, after which a scheduler counts as dead.
        outage_limit: Seconds for which a request that lost its scheduler waits for one.
        resolve_interval: Seconds between look-ups of names.
        dialer: Dialer of the connections. If it expects no name in certificates, the listed host is expected.
        clock: Monotonic nanoseconds.
        model: The requested model; empty: the one that the schedulers have.
        service: Display name of this service, the same for all its workers.

    Attributes:
        counts: Counts over all links.
        num_resubmitted: Number of requests that were sent again, by the reason.
        num_sent: Number of requests sent to each scheduler that is or was there, by its address.
    """

    def __init__(
        self,
        names: Sequence[str],
        client_id: str,
        tokenizer_sha256: bytes,
        *,
        silence_limit: float = 30.0,
        outage_limit: float = 60.0,
        resolve_interval: float = 2.0,
        dialer: LinkDialer = PLAINTEXT,
        clock: Callable[[], int] = time.monotonic_ns,
        model: str = "",
        service: str = "",
    ) -> None:
        self._hello = link_pb2.Hello(
            client_id=client_id, api_minor=API_MINOR, tokenizer_sha256=tokenizer_sha256, model=model, service=service
        )
        self._silence_limit = silence_limit
        self._outage_limit = outage_limit
        self._dialer = dialer
        self._clock = clock
        self._discovery = SchedulerDiscovery(names, self, resolve_interval)
        self._links: dict[str, SchedulerLink] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._requests: dict[TokenReceiver, RunningRequest] = {}
        self._waiting: dict[RunningRequest, None] = {}
        self._full = FullQueues()
        self._changed = asyncio.Event()
        self._vocab_size = 0
        self.counts = LinkCounts()
        self.num_resubmitted = dict.fromkeys(Move, 0)
        self.num_sent: dict[str, int] = {}

    async def run(self) -> None:
        """Keep the links up until cancelled."""
        try:
            await self._discovery.run()
        finally:
            await asyncio.gather(*(link.stop() for link in self._links.values()), *self._closing)

    # State of the schedulers.

    @property
    def service(self) -> str:
        """Display name of this service, which the schedulers get."""
        return self._hello.service

    @property
    def welcome(self) -> link_pb2.Welcome | None:
        """The Welcome with the tightest limits, which all schedulers support. None while none takes requests."""
        welcomes = [link.welcome for link in self._links.values() if link.welcome is not None]
        return min(welcomes, key=lambda welcome: welcome.max_model_len, default=None)

    @property
    def vocab_size(self) -> int:
        """Size of the model's vocabulary, by the last Welcome; 0 before the first."""
        return self._vocab_size

    @property
    def num_up(self) -> int:
        """Number of schedulers that take requests."""
        return len(self._takers())

    @property
    def num_handles(self) -> int:
        """Number of requests whose Finish has not arrived, over all links."""
        return sum(link.num_handles for link in self._links.values())

    @property
    def num_running(self) -> dict[str, int]:
        """Number of requests whose Finish has not arrived, by the address of each scheduler since start."""
        there = {address: link.num_handles for address, link in self._links.items()}
        return dict.fromkeys(self.num_sent, 0) | there

    @property
    def num_waiting(self) -> int:
        """Number of requests that lost their scheduler and wait for one."""
        return len(self._waiting)

    async def wait_up(self, limit: float) -> link_pb2.Welcome:
        """Return the Welcome, waiting up to `limit` seconds for one. Raises StatusError if there is none by then."""
        if (welcome := self.welcome) is not None:
            return welcome
        try:
            async with asyncio.timeout(limit):
                while (welcome := self.welcome) is None:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            self._hello.unserved += 1  # reported with the next attempt to connect
            raise self._make_outage() from None
        return welcome

    @property
    def dialers(self) -> dict[str, LinkDialer]:
        """Dialers of the schedulers, by their addresses."""
        return {address: link.dialer for address, link in self._links.items()}

    # Calls of requests.

    def check_room(self, tenant: bytes) -> None:
        """Raise StatusError RESOURCE_EXHAUSTED for a new request that every scheduler would refuse, by its last
        refusal.

        Args:
            tenant: As in its Submit.
        """
        self._full.check_room(tenant, [link.address for link in self._takers()], self._clock())

    def submit(self, submit: link_pb2.Submit, *, min_tokens: int = 1) -> TokenReceiver:
        """Send a request, and take ownership of the Submit, which is changed. `release` must follow.

        Raises StatusError if no scheduler takes it.
        """
        links = self._takers()
        if not links:
            raise self._make_outage()
        now = self._clock()
        request = RunningRequest(submit, min_tokens, now)
        links = [link for link in links if request.can_go_to(link)]
        if not links:
            message = "structured_output: the scheduler is of an older version, which does not know it"
            raise StatusError(grpc.StatusCode.UNIMPLEMENTED, message, field="structured_output")
        self._requests[request.receiver] = request
        link = request.choose(links)
        request.send(link, now)
        self.num_sent[link.address] += 1
        return request.receiver

    def stop_sample(self, receiver: TokenReceiver, index: int) -> None:
        """End a sample in which a stop string was found."""
        request = self._requests[receiver]
        request.stop_sample(index)
        if request in self._waiting and receiver.progress.all_ended:
            self._place(request)

    def release(self, receiver: TokenReceiver, reason: link_pb2.AbortReason) -> None:
        """Release a request whose results are no longer read. If it still runs it is aborted for `reason`."""
        request = self._requests.pop(receiver, None)
        if request is not None:
            self._waiting.pop(request, None)
            if request.link is not None:
                self._full.count_end(request.tenant, self._clock())
            request.release(reason)

    def end_all(self, why: str) -> None:
        """End every running request with UNAVAILABLE, because this worker stops."""
        for receiver in self._requests:
            receiver.fail(StatusError.unavailable(why, _RETRY_AFTER))

    # SchedulerSet

    def add(self, address: str, host: str) -> None:
        """Connect to the scheduler at an address. Idempotent."""
        link = self._links.get(address)
        if link is None:
            dialer = self._dialer
            if not dialer.tls_name and not is_ip_address(host):
                dialer = dataclasses.replace(dialer, tls_name=host)
            link = self._links[address] = SchedulerLink(
                address,
                self._hello,
                self,
                counts=self.counts,
                silence_limit=self._silence_limit,
                dialer=dialer,
                clock=self._clock,
            )
            self.num_sent.setdefault(address, 0)
            link.start()
        link.drop_when_down = False

    def drop_when_down(self, address: str) -> None:
        """Forget a scheduler once its link is down, since its name no longer resolves to its address."""
        link = self._links[address]
        link.drop_when_down = True
        if not link.is_up:
            self._discard(link)

    def _discard(self, link: SchedulerLink) -> None:
        del self._links[link.address]
        # Not awaited, because this may run inside the link's own task, which stop() ends.
        closing = asyncio.create_task(link.stop())
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    # LinkOwner

    def link_changed(self, link: SchedulerLink) -> None:
        """Send the waiting requests if a scheduler takes requests now."""
        if (welcome := link.welcome) is not None:
            self._vocab_size = welcome.vocab_size
            self._changed.set()
            for request in tuple(self._waiting):
                self._place(request)

    def request_finished(self, link: SchedulerLink, receiver: TokenReceiver, finish: link_pb2.Finish, now: int) -> None:
        """Handle a request that a scheduler ended or gave back."""
        request = self._requests[receiver]
        if finish.moved:
            link.stop_submitting("gives requests back")
            request.lose_link(StatusError.from_link(finish.status), Move.GIVEN_BACK)
            self._wait(request)
        else:
            self._full.note(request.tenant, link.address, finish, now)
            request.finish(finish, now)

    def link_lost(self, link: SchedulerLink, receivers: list[TokenReceiver], error: StatusError) -> None:
        """Move the requests of a link that broke or could not be made."""
        self._full.forget(link.address)
        if link.drop_when_down and link.address in self._links:
            self._discard(link)
        if receivers:
            _log.warning("scheduler %s is lost, %d requests move: %s", link.address, len(receivers), error.message)
        for receiver in receivers:
            request = self._requests[receiver]
            request.lose_link(error, Move.LOST)
            request.count_loss()
            if receiver.is_over:  # it failed before, and has not been released yet
                continue
            if request.losses < _MOST_LOSSES:
                self._wait(request)
            else:
                message = (
                    f"{request.losses} schedulers in a row were lost with this request, the last one: {error.message}"
                )
                receiver.fail(StatusError(grpc.StatusCode.INTERNAL, message))
        # no scheduler may be left that waiting requests can wait for
        if error.code is grpc.StatusCode.FAILED_PRECONDITION:
            for request in tuple(self._waiting):
                self._place(request)

    # The way of a request that moves.

    def _wait(self, request: RunningRequest) -> None:
        """Let a request wait for a scheduler, and send it at once if one takes it."""
        left = request.seconds_left(self._clock())
        # Decided now and not when the timer fires, because uvloop's timers may fire slightly before the deadline.
        ends_at_deadline = left <= self._outage_limit
        limit = min(self._outage_limit, left)
        request.timer = asyncio.get_running_loop().call_later(limit, self._give_up, request, ends_at_deadline)
        self._waiting[request] = None
        self._place(request)

    def _place(self, request: RunningRequest) -> None:
        """Send a waiting request to a scheduler, or end it; if neither is possible, it waits on."""
        now = self._clock()
        takers = (link for link in self._takers() if request.can_go_to(link))
        links = [link for link in takers if link.identity == request.identity]
        if request.receiver.progress.all_ended:
            request.finish_here(now)
        elif links:
            link = request.choose(links)
            request.send_again(link, now)
            self.num_sent[link.address] += 1
            self.num_resubmitted[request.move] += 1
        elif (refusal := self._refuse(request)) is not None:
            request.receiver.fail(refusal)
        else:
            return
        del self._waiting[request]
        request.stop_waiting()

    def _give_up(self, request: RunningRequest, ends_at_deadline: bool) -> None:
        """End a request that has waited for the longest time."""
        del self._waiting[request]
        if ends_at_deadline:
            message = "the deadline passed while no scheduler could be reached"
            request.receiver.fail(StatusError(grpc.StatusCode.DEADLINE_EXCEEDED, message))
        else:
            waited = f"no scheduler took the request for {self._outage_limit:g} s after its own was lost"
            request.receiver.fail(StatusError.unavailable(f"{waited}: {request.why_lost.message}", _RETRY_AFTER))

    def _takers(self) -> list[SchedulerLink]:
        """Return the links over which requests can be sent now."""
        return [link for link in self._links.values() if link.welcome is not None]

    def _refuse(self, request: RunningRequest) -> StatusError | None:
        """Return the error of a waiting request if every scheduler serves another model; None while one may still serve
        its.
        """
        assert request.identity is not None
        reasons = []
        for link in self._links.values():
            if link.identity is not None and link.identity != request.identity:
                differences = request.identity.differences(link.identity)
                reasons.append(f"{link.address} serves {link.identity.model!r}, {differences} differ")
            elif link.identity is None and link.why_down.code is grpc.StatusCode.FAILED_PRECONDITION:
                reasons.append(link.why_down.message)
            else:
                return None
        if not reasons:
            return None
        message = f"the request began with model {request.identity.model!r}, which is served no more"
        return StatusError(grpc.StatusCode.FAILED_PRECONDITION, f"{message}: {'; '.join(reasons)}")

    def _make_outage(self) -> StatusError:
        errors = [link.why_down for link in self._links.values()]
        if errors and all(error.code is grpc.StatusCode.FAILED_PRECONDITION for error in errors):
            return StatusError(grpc.StatusCode.FAILED_PRECONDITION, errors[0].message)
        reasons = [error.message for error in errors] + list(self._discovery.errors.values())
        why = "; ".join(reasons) or "none is known"
        return StatusError.unavailable(f"the scheduler cannot be reached: {why}", _RETRY_AFTER)
