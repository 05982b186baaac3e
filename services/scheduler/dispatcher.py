"""The heart of the scheduler: takes requests in, sends them to executors, and sees each one to its end."""

from __future__ import annotations

import asyncio
import logging
import random
from functools import partial
from typing import TYPE_CHECKING

import grpc

from scalellm.v1 import link_pb2, scheduler_pb2
from services.common.errors import StatusError
from services.common.health import Heartbeat
from services.scheduler.admission_queue import AdmissionQueue
from services.scheduler.affinity_store import AffinityStore
from services.scheduler.books import Books
from services.scheduler.client_link import ClientLink
from services.scheduler.config import SchedulerSettings
from services.scheduler.fleet import Fleet
from services.scheduler.prefix_index import PrefixIndex, block_hashes
from services.scheduler.rates import DrainRate
from services.scheduler.replica_link import ReplicaLink
from services.scheduler.request import Request, RequestState
from services.scheduler.request_trace import RequestTrace
from services.scheduler.router import Router, Verdict
from services.scheduler.step_relay import relay_step

if TYPE_CHECKING:
    from services.common.tracing.tracer import Tracer

_log = logging.getLogger(__name__)

_UNAVAILABLE = grpc.StatusCode.UNAVAILABLE.value[0]
_CANCELLED = link_pb2.ABORT_REASON_CANCELLED
_RETRY_AFTER = 1.0


class Dispatcher:
    """Runs on one event loop, driven by events alone: submit, abort, frame, link up or down, deadline.

    Args:
        settings: Limits and times.
        fleet: The executors.
        affinity: Where sessions ran last.
        heartbeat: Told of progress.
        tracer: Makes spans; None = traces are off.
    """

    def __init__(
        self,
        settings: SchedulerSettings,
        fleet: Fleet,
        affinity: AffinityStore,
        heartbeat: Heartbeat,
        tracer: Tracer | None = None,
    ) -> None:
        self.queue: AdmissionQueue[Request] = AdmissionQueue(settings.max_queued_requests, settings.max_queued_tokens)
        self.books = Books()
        self.is_draining = False
        self._settings = settings
        self._fleet = fleet
        self._affinity = affinity
        self._heartbeat = heartbeat
        self._tracer = tracer
        self._loop = asyncio.get_running_loop()
        self._links: set[ClientLink] = set()
        self._prefixes = PrefixIndex()
        self._router = Router(self._prefixes)
        self._rate = DrainRate()
        self._random = random.SystemRandom()
        self._arrivals = 0
        self._pump_due = False
        self._idle = asyncio.Event()
        self._idle.set()

    # What clients do.

    def open_link(self, link: ClientLink) -> None:
        """A client link stands."""
        self._links.add(link)

    def close_link(self, link: ClientLink) -> None:
        """A client link is gone: nobody waits for its requests any more."""
        self._links.discard(link)
        for request in tuple(link.requests.values()):
            self._abandon(request, StatusError(grpc.StatusCode.CANCELLED, "the client's link closed"))

    @property
    def num_links(self) -> int:
        """Client links that stand."""
        return len(self._links)

    def submit(self, link: ClientLink, submit: link_pb2.Submit) -> None:
        """Take a request in, or end it at once. Raises StatusError where the link itself is at fault."""
        if submit.handle in link.requests:
            raise StatusError.invalid("handle", f"{submit.handle} is still in use by another request of this link")
        now = self._loop.time()
        self._arrivals += 1
        request = Request(link, submit, self._arrivals, now)
        link.requests[request.handle] = request
        self.books.accepted += 1
        self.books.prompt_tokens += request.num_prompt_tokens
        self._idle.clear()
        try:
            request.check()
            if self._tracer is not None:
                request.trace = RequestTrace.begin(self._tracer, submit)
            if self.is_draining:
                raise StatusError.unavailable("the scheduler is draining", retry_after=_RETRY_AFTER)
            if request.all_samples_ended:  # the client's link broke before the Finish
                self._end(request, request.make_finish(None))
                return
            if self._fleet.outage is not None:
                raise self._fleet.outage
            remaining = request.deadline - now if request.deadline is not None else None
            crowded_out = self.queue.admit(request, remaining, self._rate.tokens_per_second)
        except StatusError as error:
            self._end(request, request.make_finish(error))
            return
        for other in crowded_out:
            self._end(other, other.make_finish(self.queue.crowded_out(self._rate.tokens_per_second)))
        if not submit.sampling.HasField("seed"):
            # Drawn here and not on the executor, so that another executor repeats it.
            submit.sampling.seed = self._random.getrandbits(64)
        if request.deadline is not None:
            request.timer = self._loop.call_at(request.deadline, self._on_deadline, request)
        request.hashes = block_hashes(submit.token_ids, submit.cache_salt)
        self._find_session(request)
        self._heartbeat.expect_work()
        self._schedule_pump()

    def abort(self, link: ClientLink, abort: link_pb2.Abort) -> None:
        """End a request, or one sample of it, because the client wants to. Unknown handles are ignored."""
        request = link.requests.get(abort.handle)
        if request is None:
            return
        request.request_end(abort)
        if request.replica is not None:
            index = abort.index if abort.HasField("index") else None
            request.replica.abort(request.replica_handle, abort.reason, index)
            return
        request.settle_stopping()
        if request.cancelled is not None or request.all_samples_ended:
            self._end(request, request.make_finish(request.cancelled))

    # What executors do (FleetListener).

    def fleet_changed(self) -> None:
        """Other executors are ready than before: what was measured is void."""
        self._rate.reset()
        self._schedule_pump()

    def fleet_out(self, error: StatusError) -> None:
        """No executor came back in time: nothing that waits can run."""
        for request in self.queue.in_order():
            self._end(request, request.make_finish(error))

    def model_changed(self) -> None:
        """The token ids of all clients mean nothing to the new model: they have to shake hands again."""
        for link in tuple(self._links):
            for request in tuple(link.requests.values()):
                self._abandon(request, StatusError.unavailable("the executors run another model now"))
            link.close()

    def replica_stepped(self, replica: ReplicaLink, step: link_pb2.StepOutput) -> None:
        """An executor sent a frame: pass it on."""
        for request, problem in relay_step(step, replica.running, self.books):
            if request.state is RequestState.RUNNING:
                fields = {"request_id": request.submit.request_id}
                _log.error(
                    "executor %s broke the protocol, the request ends: %s", replica.address, problem, extra=fields
                )
                error = f"executor {replica.address} broke the protocol: {problem}"
                self._abandon(request, StatusError(grpc.StatusCode.INTERNAL, error))
        for finish in step.finished:
            request_or_none = replica.running.get(finish.handle)
            if request_or_none is not None:
                self._on_finish(request_or_none, finish, replica)
        self._heartbeat.beat(has_work=not self._idle.is_set())
        if self.queue:
            self._schedule_pump()

    def requests_lost(self, requests: list[Request], replica: ReplicaLink, error: StatusError, planned: bool) -> None:
        """An executor's link broke: go on elsewhere."""
        _log.warning("executor %s is lost, %d requests move: %s", replica.address, len(requests), error.message)
        for request in requests:
            self._move(request, lost=True, is_death=not planned, error=error)

    # Draining.

    def begin_drain(self) -> None:
        """Admit nothing more."""
        if not self.is_draining:
            self.is_draining = True
            for link in self._links:
                link.announce_draining()

    async def wait_idle(self, timeout: float) -> int:
        """Wait until nothing is queued or running, or the time has passed. Returns what is left."""
        try:
            async with asyncio.timeout(timeout):
                await self._idle.wait()
        except TimeoutError:
            pass
        return len(self.queue) + self._fleet.num_running

    def end_all(self, error: StatusError) -> None:
        """End what is left, and all client links."""
        for link in tuple(self._links):
            for request in tuple(link.requests.values()):
                self._abandon(request, error)
            link.close()

    def fill_state(self, state: scheduler_pb2.GetStateResponse) -> None:
        """Queue and books, at one instant."""
        state.queued = len(self.queue)
        state.queued_tokens = self.queue.num_tokens
        state.running = self._fleet.num_running
        state.accepted = self.books.accepted
        state.finished = self.books.finished
        state.cancelled = self.books.cancelled
        state.rejected = self.books.rejected
        state.resubmitted = self.books.resubmitted
        state.draining = self.is_draining

    # The way of a request.

    def _schedule_pump(self) -> None:
        # Once per turn of the loop, however many events there were; and never inside a link's callback.
        if not self._pump_due:
            self._pump_due = True
            self._loop.call_soon(self._pump)

    def _pump(self) -> None:
        self._pump_due = False
        now = self._loop.time()
        num_requests = num_tokens = 0
        for request in self.queue.in_order():
            if not any(replica.has_credit for replica in self._fleet.ready):
                break
            if request.awaits_affinity:
                continue
            try:
                replica = self._route(request, now)
                if replica is None:
                    continue
                self._dispatch(request, replica, now)
            except Exception:  # whatever it is about this request, the others go on
                _log.exception("a request could not be sent, it ends", extra={"request_id": request.submit.request_id})
                self._abandon(request, StatusError(grpc.StatusCode.INTERNAL, "the request could not be sent"))
            else:
                num_requests += 1
                num_tokens += request.num_prompt_tokens
        ready = self._fleet.ready
        held_back = bool(self.queue and ready) and not any(replica.has_credit for replica in ready)
        self._rate.update(now, num_requests, num_tokens, held_back)

    def _route(self, request: Request, now: float) -> ReplicaLink | None:
        choice = self._router.route(
            self._fleet.ready,
            num_prompt_tokens=request.num_prompt_tokens,
            max_len=request.max_len,
            hashes=request.hashes,
            session_address=request.session_address,
            may_wait=request.session_wait_until is None or now < request.session_wait_until,
            refused_by=request.refused_by,
        )
        if isinstance(choice, ReplicaLink):
            return choice
        if choice is Verdict.WAIT_FOR_SESSION and request.session_wait_until is None:
            request.session_wait_until = now + self._settings.session_wait_s
            self._loop.call_at(request.session_wait_until, self._schedule_pump)
        elif choice is Verdict.REFUSED_BY_ALL:
            *_, reason = request.refused_by.values()
            message = f"every executor has refused the request, the last one: {reason}"
            self._end(request, request.make_finish(StatusError.unavailable(message, _RETRY_AFTER)))
        return None

    def _dispatch(self, request: Request, replica: ReplicaLink, now: float) -> None:
        self.queue.remove(request)
        is_first = request.dispatches == 0
        if request.trace is not None:
            request.trace.dispatch(replica.address)
        replica.dispatch(request, now, self._prefixes.matched_tokens(request.hashes, replica.instance_id))
        self.books.dispatched += 1
        if is_first:
            self.books.queue_time.observe(request.admission_seconds)
        self._prefixes.record(request.hashes, replica.instance_id)
        if request.session_id:
            self._affinity.record(request.session_id, replica.address)

    def _on_finish(self, request: Request, finish: link_pb2.Finish, replica: ReplicaLink) -> None:
        if finish.status.code == _UNAVAILABLE:
            # Before any token: it takes no requests, for instance because it drains. After that: it failed.
            failed = request.num_emitted > request.num_resumed
            request.refused_by[replica.instance_id] = finish.status.message
            replica.release(request.replica_handle)
            self._move(request, lost=failed, is_death=failed, error=StatusError.from_link(finish.status))
            return
        if request.num_resumed:
            finish.usage.num_resumed = request.num_resumed
        finish.timings.executor_id = replica.address
        self._end(request, finish)

    def _move(self, request: Request, *, lost: bool, is_death: bool, error: StatusError) -> None:
        if request.trace is not None:
            request.trace.come_back(error)
        request.settle_stopping()
        request.deaths += is_death
        if request.cancelled is not None or request.all_samples_ended:
            self._end(request, request.make_finish(request.cancelled))
        elif request.deaths >= self._settings.max_executor_deaths:
            message = f"{request.deaths} executors died while they ran this request, the last one: {error.message}"
            self._end(request, request.make_finish(StatusError(grpc.StatusCode.INTERNAL, message)))
        elif self._fleet.outage is not None:
            self._end(request, request.make_finish(self._fleet.outage))
        else:
            request.requeue(lost=lost)
            self.queue.put_back(request)
            self.books.resubmitted += lost
            self._schedule_pump()

    def _on_deadline(self, request: Request) -> None:
        assert request.deadline is not None
        now = self._loop.time()
        backstop = request.deadline + self._settings.deadline_backstop_s
        if request.state is RequestState.RUNNING and now < backstop:
            # The executor knows the deadline and ends it with exact numbers; if it cannot, this timer does.
            request.timer = self._loop.call_at(backstop, self._on_deadline, request)
            return
        where = "while the request waited for an executor" if request.replica is None else "on the executor"
        error = StatusError(grpc.StatusCode.DEADLINE_EXCEEDED, f"the deadline passed {where}")
        self._abandon(request, error, link_pb2.ABORT_REASON_DEADLINE)

    def _abandon(self, request: Request, error: StatusError, reason: link_pb2.AbortReason = _CANCELLED) -> None:
        """End a request wherever it is, without waiting for its executor."""
        if request.replica is not None:
            request.replica.abort(request.replica_handle, reason)
        self._end(request, request.make_finish(error))

    def _end(self, request: Request, finish: link_pb2.Finish) -> None:
        replica = request.replica
        if request in self.queue:
            self.queue.remove(request)
        now = self._loop.time()
        request.end(now)
        if request.trace is not None:
            request.trace.end(finish)
        if replica is not None:
            replica.release(request.replica_handle)
        finish.handle = request.handle
        request.add_timings(finish.timings, now)
        self.books.count_end(finish.status.code)
        request.link.add_finish(finish)
        if not self.books.num_open:
            self._idle.set()
            self._heartbeat.beat(has_work=False)

    def _find_session(self, request: Request) -> None:
        if not request.session_id:
            return
        request.session_address = self._affinity.get(request.session_id)
        if request.session_address is None and self._affinity.redis_ok:
            request.awaits_affinity = True
            self._affinity.look_up(request.session_id).add_done_callback(partial(self._on_session_found, request))

    def _on_session_found(self, request: Request, found: asyncio.Future[str | None]) -> None:
        request.session_address = found.result()
        request.awaits_affinity = False
        self._schedule_pump()
