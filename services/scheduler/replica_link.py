"""One executor, as the scheduler sees it: its link, its credits and its running requests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import grpc

from scalellm.services.common.errors import StatusError
from scalellm.services.common.link import MOVES_SINCE, PLAINTEXT, Handles, LinkClient, LinkDialer, LinkTraffic
from scalellm.services.scheduler.client_side import ClientSide
from scalellm.services.scheduler.request import Request
from scalellm.v1 import executor_pb2, link_pb2, scheduler_pb2

if TYPE_CHECKING:
    from scalellm.services.scheduler.placement import Placement

_CONNECTING = scheduler_pb2.EXECUTOR_PHASE_CONNECTING
_READY = scheduler_pb2.EXECUTOR_PHASE_READY
_DRAINING = scheduler_pb2.EXECUTOR_PHASE_DRAINING
_INCOMPATIBLE = scheduler_pb2.EXECUTOR_PHASE_INCOMPATIBLE


HomeOf = Callable[["ReplicaLink", link_pb2.Welcome], "Placement"]
"""Moves an executor that has sent its Welcome to the fleet of its model, and returns that model's placement."""


class ReplicaLink:
    """The link to the executor at one address, over all its incarnations.

    Credits, handles and running requests belong to one connection and end with it, so a late frame of a former
    incarnation cannot reach a request of the present one.

    Args:
        address: host:port of the executor.
        hello: First frame of each connection.
        placement: Handles the link's events.
        silence_limit: Seconds without a frame, while answers are due, after which the executor counts as dead.
        dialer: Dialer of the connection.
        home_of: See HomeOf; None: the placement stays.
    """

    def __init__(
        self,
        address: str,
        hello: link_pb2.Hello,
        placement: Placement,
        silence_limit: float,
        dialer: LinkDialer = PLAINTEXT,
        home_of: HomeOf | None = None,
    ) -> None:
        self.address = address
        self._handles: Handles[Request] = Handles()
        self.running = self._handles.requests
        self.clients: dict[int, ClientSide] = {}
        """The client's sides of the running requests by handle, for the per-token path."""
        self.welcome: link_pb2.Welcome | None = None
        self.load = link_pb2.Load()
        self.is_leaving = False
        self.is_forgotten_when_down = False
        self.last_error = ""
        self._placement = placement
        self._home_of = home_of
        self.is_suspect = False
        self._is_starting = False
        self._is_incompatible = False
        self._lost_instance = ""
        self._submitted_requests = 0
        self._submitted_tokens = 0
        self._tokens_since_load = 0
        self._num_tokens = 0
        # By handle, the recalled requests whose Finish has not come: prompt tokens of credit that are free again.
        self._recalled: dict[int, int] = {}
        self._client = LinkClient(
            address,
            executor_pb2.DESCRIPTOR.services_by_name["Executor"].methods_by_name["Execute"],
            hello,
            self,
            dialer=dialer,
            silence_limit=silence_limit,
            is_busy=lambda: self._owes_answers,
            demand=lambda: self._placement.demand(),
        )
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Connect, and reconnect whenever the link breaks."""
        self._task = asyncio.create_task(self._client.run(), name=f"replica {self.address}")

    async def stop(self) -> None:
        """Close the link."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def stay(self) -> None:
        """Keep the executor: its address is listed (again)."""
        self.is_leaving = self.is_forgotten_when_down = False
        self._placement.replica_changed(self)

    def leave(self) -> None:
        """Send the executor no new requests: its address was taken off the list."""
        self.is_leaving = True
        self._placement.replica_changed(self)

    def forget_when_down(self) -> None:
        """Forget the executor once its link is down: its name no longer resolves to its address."""
        self.is_forgotten_when_down = True
        self._placement.replica_changed(self)

    def dispatch(
        self,
        request: Request,
        now: float,
        cached_tokens: int,
        *,
        ahead: bool = False,
        in_place_of: Sequence[Request] = (),
    ) -> None:
        """Send a request to the executor and deduct its uncached prompt tokens from the credit.

        Args:
            request: The request.
            now: Monotonic seconds.
            cached_tokens: Leading prompt tokens that the executor has probably cached.
            ahead: True if it passes the requests of its own priority that wait at the executor.
            in_place_of: Running requests that the executor gives back first, each with a Finish whose `moved` is set.
        """
        for other in in_place_of:
            other.executor.is_recalled = True
            self._recalled[other.executor.handle] = 0 if other.num_new_tokens else other.executor.charged_tokens
        charged_tokens = max(1, request.num_prompt_tokens - cached_tokens)
        submit = request.make_submit(now, charged_tokens, ahead=ahead)
        submit.in_place_of[:] = [other.executor.handle for other in in_place_of]
        submit.handle = handle = self._handles.take(request)
        self._submitted_requests += 1
        self._submitted_tokens += charged_tokens
        self._tokens_since_load += charged_tokens
        self.clients[handle] = request.client
        request.start(self, handle, now)
        self._client.submit(submit)
        self._placement.load_changed(self)

    def announce_demand(self) -> None:
        """Report the requests that wait here for credits to the executor, which divides credits among its
        schedulers.
        """
        self._client.announce_demand()

    def abort(self, handle: int, reason: link_pb2.AbortReason, index: int | None = None) -> None:
        """Ask the executor to end a request, or one sample of it."""
        self._client.abort(handle, reason, index)

    def release(self, handle: int) -> None:
        """Forget a request that has ended or left the executor, and free its handle."""
        if handle in self.running:
            self._handles.release(handle)
            del self.clients[handle]
        self._placement.load_changed(self)
        if self.is_leaving and not self.running:
            self._placement.replica_changed(self)

    @property
    def phase(self) -> scheduler_pb2.ExecutorPhase:
        """Phase of the executor. Only a ready one gets new requests."""
        if self._is_incompatible:
            return _INCOMPATIBLE
        if self.is_leaving or (self.welcome is not None and self.load.draining):
            return _DRAINING
        return _READY if self.welcome is not None else _CONNECTING

    @property
    def is_up(self) -> bool:
        """True while the link is connected."""
        return self.welcome is not None

    @property
    def is_reachable(self) -> bool:
        """True if the executor answers and is expected to take requests soon, for instance once its engine is up."""
        return not self.is_leaving and not self._is_incompatible and (self.is_up or self._is_starting)

    @property
    def is_gone(self) -> bool:
        """True if the executor is not expected to come back."""
        return (self.is_leaving and not self.running) or (self.is_forgotten_when_down and not self.is_up)

    @property
    def is_ready(self) -> bool:
        """True if new requests may go to this executor."""
        return self.phase == _READY

    @property
    def instance_id(self) -> str:
        """Id of the connected incarnation. Empty while there is none."""
        return self.welcome.instance_id if self.welcome is not None else ""

    @property
    def has_credit(self) -> bool:
        """True if the executor takes another request now. One request may exceed the remaining credit of tokens.

        A suspect executor gets one request at a time.
        """
        return not (self.is_suspect and self.running) and self._has_request_credit and self.num_tokens_short <= 0

    @property
    def _has_request_credit(self) -> bool:
        # Recalled requests do not count: the Submit in their place takes their credit, which the next load may contain.
        return self._submitted_requests < self.load.granted_requests

    @property
    def num_tokens_short(self) -> int:
        """Prompt tokens of credit that are missing before another request can be sent; 0 or less: none."""
        granted = self.load.granted_prefill_tokens + sum(self._recalled.values())
        return self._submitted_tokens + 1 - granted

    def lacks_room(self, request: Request) -> bool:
        """True if a request that is sent now would wait at the executor for a row or for cache blocks."""
        num_rows = sum(other.executor.num_rows for other in self.running.values() if not other.executor.is_recalled)
        return (
            not self._has_request_credit
            or num_rows + request.num_rows > self.max_num_seqs
            or self.free_blocks * self.block_size < request.num_prompt_tokens
        )

    @property
    def takes_moves(self) -> bool:
        """True if the executor's version can give requests back (Submit.in_place_of)."""
        return self.welcome is not None and self.welcome.api_minor >= MOVES_SINCE

    def can_run(self, request: Request) -> bool:
        """True if the executor supports all features that the request asks for."""
        return self.takes_grammars or not request.needs_grammars

    @property
    def takes_grammars(self) -> bool:
        """True if the executor runs requests with a grammar."""
        return self.welcome is not None and self.welcome.grammars

    @property
    def _owes_answers(self) -> bool:
        """True if the executor owes a Finish, be it for a request that was given up here, so that a hang is noticed."""
        return len(self._handles) > 0

    @property
    def tensor_parallel(self) -> int:
        """Devices that compute each token together."""
        return max(1, self.welcome.tensor_parallel) if self.welcome is not None else 1

    @property
    def num_devices(self) -> int:
        """Number of devices of the executor."""
        return max(1, self.welcome.devices) if self.welcome is not None else 1

    @property
    def max_model_len(self) -> int:
        """Longest prompt plus output, in tokens."""
        return self.welcome.max_model_len if self.welcome is not None else 0

    @property
    def block_size(self) -> int:
        """Tokens per cache block."""
        return self.welcome.block_size if self.welcome is not None else 0

    @property
    def free_blocks(self) -> int:
        """Cache blocks that are free or can be evicted, at the last report."""
        return self.load.free_blocks

    @property
    def max_num_seqs(self) -> int:
        """Most sequences that the executor runs at once."""
        return self.welcome.max_num_seqs if self.welcome is not None else 0

    @property
    def cache_tokens(self) -> int:
        """Capacity of the executor's cache, in tokens."""
        return self.welcome.num_blocks * self.welcome.block_size if self.welcome is not None else 0

    @property
    def num_requests(self) -> int:
        """Running and waiting requests at the executor: those sent from here, or as reported if other schedulers add
        more.
        """
        return max(len(self.running), self.load.running + self.load.waiting)

    @property
    def pending_prefill_tokens(self) -> int:
        """Prompt tokens that wait at the executor: those last reported, plus those sent since."""
        return self.load.waiting_prefill_tokens + self._tokens_since_load

    @property
    def num_running(self) -> int:
        """Running requests at the executor: those sent from here, or as reported if other schedulers add more."""
        return max(len(self.running), self.load.running)

    @property
    def traffic(self) -> LinkTraffic:
        """Messages and bytes of the link, over all incarnations."""
        return self._client.traffic

    def describe(self) -> scheduler_pb2.ExecutorState:
        """Return the executor's state for GetState."""
        return scheduler_pb2.ExecutorState(
            address=self.address,
            instance_id=self.instance_id,
            phase=self.phase,
            load=self.load,
            running=len(self.running),
            last_error=self.last_error,
            model=self.welcome.model if self.welcome is not None else "",
            credit_requests=max(0, self.load.granted_requests - self._submitted_requests) if self.is_up else 0,
            tensor_parallel=self.tensor_parallel,
            tokens=self._num_tokens,
            credit_tokens=max(0, self.load.granted_prefill_tokens - self._submitted_tokens) if self.is_up else 0,
        )

    # Callbacks of LinkClient.

    def on_up(self, welcome: link_pb2.Welcome) -> None:
        """Take over the executor's Welcome: the link is up."""
        self._is_incompatible = self._is_starting = False
        if self._home_of is not None:
            self._placement = self._home_of(self, welcome)
        try:
            self._placement.check_welcome(self, welcome)
        except StatusError:
            self._is_incompatible = True
            raise
        self.welcome = welcome
        self.load = link_pb2.Load()
        self.load.CopyFrom(welcome.load)
        self.last_error = ""
        self.is_suspect = welcome.instance_id == self._lost_instance
        self._submitted_requests = self._submitted_tokens = self._tokens_since_load = 0
        self._placement.replica_changed(self)

    def on_step(self, step: link_pb2.StepOutput) -> None:
        """Handle a frame of the executor: update load and credits, then pass it on to placement."""
        # taken now, because placement changes the Finishes as it passes them on
        ended = [finish.handle for finish in step.finished]
        for handle in ended:
            self._recalled.pop(handle, None)
        self._num_tokens += len(step.token_ids)
        if step.handles or step.finished:
            self.is_suspect = False
        if step.HasField("load"):
            was_draining = self.load.draining
            self.load.MergeFrom(step.load)
            self._tokens_since_load = 0
            if self.load.draining != was_draining:
                self._placement.replica_changed(self)
        self._placement.load_changed(self)
        self._placement.replica_stepped(self, step)
        for handle in ended:
            self._handles.finish(handle)

    def on_down(self, error: StatusError) -> None:
        """Handle a link that broke or could not be made: give its requests back to placement."""
        instance_id = self.instance_id
        if self.is_up and self._owes_answers:
            self._lost_instance = self.instance_id
        lost = sorted(self._handles.clear(), key=lambda request: request.arrival)
        self.clients.clear()
        self._recalled.clear()
        self.welcome = None
        self.last_error = error.message
        # A time to retry comes from a front that answers, so its engine is starting.
        self._is_starting = error.code is grpc.StatusCode.UNAVAILABLE and error.retry_after is not None
        if error.code is not grpc.StatusCode.FAILED_PRECONDITION:
            self._is_incompatible = False
        self._placement.replica_lost(self, lost, instance_id, error)
