"""Placement of requests: from the queue to an executor, from a lost executor to another one, and to the Finish."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import grpc

from scalellm.services.common.errors import StatusError
from scalellm.services.common.health import Heartbeat
from scalellm.services.scheduler.admission_queue import AdmissionQueue
from scalellm.services.scheduler.affinity_store import AffinityStore
from scalellm.services.scheduler.books import Books
from scalellm.services.scheduler.config import SchedulerSettings
from scalellm.services.scheduler.fleet import Fleet
from scalellm.services.scheduler.outages import Outages
from scalellm.services.scheduler.prefix_index import block_hashes
from scalellm.services.scheduler.quarantine import Quarantine
from scalellm.services.scheduler.rates import DrainRate
from scalellm.services.scheduler.replica_link import ReplicaLink
from scalellm.services.scheduler.request import Request, RequestState
from scalellm.services.scheduler.router import Verdict
from scalellm.services.scheduler.row_recall import RowRecall
from scalellm.services.scheduler.session_lookup import SessionLookup
from scalellm.services.scheduler.step_relay import relay_step
from scalellm.services.scheduler.token_service import TokenService
from scalellm.v1 import link_pb2

_log = logging.getLogger(__name__)

_UNAVAILABLE = grpc.StatusCode.UNAVAILABLE.value[0]
_CANCELLED = link_pb2.ABORT_REASON_CANCELLED
_RETRY_AFTER = 1.0


class Placement:
    """Dispatches the requests of one model to its executors and ends them. Driven by events on one event loop: a
    request that arrives, a frame of an executor, a link that goes up or down, a deadline.

    Args:
        settings: Limits and times.
        fleet: The executors.
        affinity: The last executor of each session.
        heartbeat: Records progress, for the health check.
    """

    def __init__(
        self, settings: SchedulerSettings, fleet: Fleet, affinity: AffinityStore, heartbeat: Heartbeat
    ) -> None:
        self.service = TokenService()
        self.queue: AdmissionQueue[Request] = AdmissionQueue(
            settings.max_queued_requests, settings.max_queued_tokens, self.service
        )
        self.books = Books()
        self.outages = Outages(settings, fleet, self._on_given_up)
        self.on_new_model: Callable[[], None] = lambda: None
        """Called when another model has replaced the one that the executors served."""
        self.on_executors_changed: Callable[[], None] = lambda: None
        """Called when an executor begins or ceases to be ready, and when the wait for one is given up."""
        self._settings = settings
        self._fleet = fleet
        self._affinity = affinity
        self._sessions = SessionLookup(affinity, self._schedule_pump)
        self._heartbeat = heartbeat
        self._loop = asyncio.get_running_loop()
        self._router = fleet.router
        self.quarantine = Quarantine(settings.max_executor_deaths)
        self._recall = RowRecall(self.service, self.books)
        self._rate = DrainRate()
        self._uncharged: dict[ReplicaLink, None] = {}  # executors that sent tokens since outputs were last charged
        self._pump_due = False
        self._idle = asyncio.Event()
        self._idle.set()

    def start(self) -> None:
        """Start. The grace period for the first executor begins now."""
        self._fleet.start(self)
        self.outages.update()

    def stop(self) -> None:
        """Stop the timers of the outages."""
        self.outages.stop()

    # Calls of clients, by way of Intake.

    def count_in(self, request: Request) -> None:
        """Count an arriving request as accepted. From here on, `end` must be called for it."""
        self.books.accepted += 1
        self.books.prompt_tokens += request.num_prompt_tokens
        if request.tenant not in self.service:
            self._charge_outputs()  # before the newcomer's account starts from the least served of the others
        self.service.enter(request.tenant, request.tenant_weight, self.queue.tenants)
        self._idle.clear()

    def enter(self, request: Request, now: float) -> None:
        """Queue a request that was counted in. Raises StatusError if it is refused; the caller then ends it."""
        if (error := self.outages.refusal(request)) is not None:
            raise error
        self.quarantine.check(request.submit, now)
        if request.submit.attempt:
            self.queue.put_back(request)
        else:
            self._admit(request, now)
        if request.deadline is not None:
            request.timer = self._loop.call_at(request.deadline, self._on_deadline, request)
        request.executor.hashes = block_hashes(request.submit.token_ids, request.submit.cache_salt)
        self._sessions.start(request)
        self._heartbeat.expect_work()
        self._schedule_pump()

    def _admit(self, request: Request, now: float) -> None:
        remaining = request.deadline - now if request.deadline is not None else None
        crowded_out = self.queue.admit(request, remaining, self._rate.tokens_per_second)
        for other in crowded_out:
            self.end(other, other.make_finish(self.queue.crowded_out(self._rate.tokens_per_second)))

    def abort(self, request: Request, abort: link_pb2.Abort) -> None:
        """Handle a client's Abort of a request or sample: pass it to the executor, or apply it here while queued."""
        client, executor = request.client, request.executor
        if not client.request_end(abort):
            return
        if executor.replica is not None:
            executor.replica.abort(executor.handle, abort.reason, abort.index if abort.HasField("index") else None)
            return
        client.settle_stopping()
        if client.cancelled is not None or client.progress.all_ended:
            self.end(request, request.make_finish(client.cancelled))

    def abandon(
        self,
        request: Request,
        error: StatusError,
        reason: link_pb2.AbortReason = _CANCELLED,
        *,
        moved: bool = False,
    ) -> None:
        """End a request with an error, without waiting for its executor; moved: the client may send it elsewhere."""
        if (replica := request.executor.replica) is not None:
            replica.abort(request.executor.handle, reason)
        self.end(request, request.make_finish(error, moved=moved))

    def end(self, request: Request, finish: link_pb2.Finish) -> None:
        """End a request: send its Finish to the client, and release its place in the queue or on its executor."""
        replica, handle = request.executor.replica, request.executor.handle
        if request in self.queue:
            self.queue.remove(request)
        now = self._loop.time()
        self.service.settle(request)
        self.service.leave(request.tenant)
        request.end(now)
        if request.trace is not None:
            request.trace.end(finish)
        if replica is not None:
            replica.release(handle)
        finish.handle = request.client.handle
        request.times.fill(finish.timings, now)
        self.books.count_end(finish.status.code)
        request.client.link.add_finish(finish)
        if not self.books.num_open:
            self._idle.set()
            self._heartbeat.beat(has_work=False)

    async def wait_idle(self, timeout: float) -> int:
        """Wait until nothing is queued or running, at most `timeout` seconds. Returns the number of requests left."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._idle.wait()
        return len(self.queue) + self._fleet.num_running

    # Events of executors, reported by their links (ReplicaLink).

    def check_welcome(self, replica: ReplicaLink, welcome: link_pb2.Welcome) -> None:
        """Check an executor's model against the others'. Raises StatusError if it cannot serve beside them."""
        if self._fleet.adopt(replica, welcome):
            self.on_new_model()

    def replica_changed(self, replica: ReplicaLink) -> None:
        """Update the fleet and the outages after an executor began or ceased to take requests, or left."""
        changed = self._fleet.refresh(replica)
        if not replica.running:
            self._uncharged.pop(replica, None)
        self.outages.update()
        if changed:
            self._heartbeat.beat(has_work=not self._idle.is_set())  # requests may have waited long for an executor
            self._rate.reset()  # it was measured with other executors
            self._schedule_pump()
            self.on_executors_changed()

    def load_changed(self, replica: ReplicaLink) -> None:
        """Update the router after an executor's load, credits or suspicion of being dead changed."""
        self._router.update(replica)

    def replica_stepped(self, replica: ReplicaLink, step: link_pb2.StepOutput) -> None:
        """Pass a frame of an executor on to the clients. Its load report was handled before."""
        if step.handles:
            self._uncharged[replica] = None
        ended = [replica.running.get(sample.handle) for sample in step.finished_samples]
        for handle, problem in relay_step(step, replica.clients, self.books):
            request = replica.running.get(handle)
            if request is not None:
                error = f"executor {replica.address} broke the protocol: {problem}"
                _log.error("a request ends: %s", error, extra={"request_id": request.submit.request_id})
                self.abandon(request, StatusError(grpc.StatusCode.INTERNAL, error))
        for request in filter(None, ended):
            self.service.take_ended_rows(request)
        for finish in step.finished:
            request = replica.running.get(finish.handle)
            if request is not None:
                self._on_finish(request, finish, replica)
        self._heartbeat.beat(has_work=not self._idle.is_set())
        if self.queue:
            self._schedule_pump()

    def demand(self) -> link_pb2.Renewal:
        """Return the queued requests, prompt tokens and tenants, as executors are told of them."""
        queue = self.queue
        return link_pb2.Renewal(
            queued_requests=len(queue), queued_tokens=queue.num_tokens, queued_tenants=queue.num_tenants
        )

    def replica_lost(self, replica: ReplicaLink, requests: list[Request], instance_id: str, error: StatusError) -> None:
        """Move the requests that ran on an executor, under `instance_id`, whose link broke or could not be made."""
        is_planned = replica.is_leaving or replica.load.draining
        self.replica_changed(replica)
        # With the last executor of its model, links of clients that named no model end, and so do their requests.
        requests = [request for request in requests if request.state is RequestState.RUNNING]
        if requests:
            _log.warning("executor %s is lost, %d requests move: %s", replica.address, len(requests), error.message)
            self._move_all(requests, error, died_on="" if is_planned else instance_id)

    # The way of a request.

    def _on_given_up(self) -> None:
        """End the queued requests for which no executor came back in time."""
        for request in list(self.queue.in_order()):
            if (error := self.outages.refusal(request)) is not None:
                self.end(request, request.make_finish(error))
        self.on_executors_changed()

    def _schedule_pump(self) -> None:
        # One pump per iteration of the event loop, however many events ask for it; never inside a link's callback.
        if not self._pump_due:
            self._pump_due = True
            self._loop.call_soon(self._pump)

    def _pump(self) -> None:
        self._pump_due = False
        now = self._loop.time()
        if self.queue and self.service.num_active > 1:
            self._charge_outputs()
        sent: list[Request] = []
        if self._router.has_credit():
            for request in self.queue.in_order():
                if self._may_go(request):
                    with self._ending_what_fails(request):
                        if self._place(request, now):
                            sent.append(request)
                    if not self._router.has_credit():
                        break
        if self.queue and self.service.num_active > 1:
            self._recall_rows(now)
        held_back = bool(self.queue and self._fleet.ready) and not self._router.has_credit()
        self._rate.update(now, len(sent), sum(request.num_prompt_tokens for request in sent), held_back)
        self._fleet.announce_demand(self.demand())
        # The executors that are ready have stalled only if there is something that they could do.
        if self.books.num_open == len(self.queue) and all(map(self.outages.holds, self.queue.in_order())):
            self._heartbeat.beat(has_work=False)

    def _charge_outputs(self) -> None:
        for replica in self._uncharged:
            self.service.charge_outputs(replica.running.values())
        self._uncharged.clear()

    def _may_go(self, request: Request) -> bool:
        return not request.executor.awaits_session and self.quarantine.may_run(request)

    @contextmanager
    def _ending_what_fails(self, request: Request) -> Iterator[None]:
        """End this request alone with INTERNAL if sending it raises, so that the others are still served."""
        try:
            yield
        except Exception:
            _log.exception("a request could not be sent, it ends", extra={"request_id": request.submit.request_id})
            self.abandon(request, StatusError(grpc.StatusCode.INTERNAL, "the request could not be sent"))

    def _place(self, request: Request, now: float) -> bool:
        """Send a request to an executor that takes it. Returns False if none does yet."""
        replica = self._route(request, now)
        if replica is None:
            return False
        would_wait = self.service.num_active > 1 and replica.lacks_room(request)
        if not (would_wait and self._place_on_recalled_row(request, self.service.by_rows(), now)):
            self._dispatch(request, replica, (), now)
        return True

    def _recall_rows(self, now: float) -> None:
        """Take back executors' rows for the next request of each tenant that was served too little, one per tenant."""
        givers = self.service.by_rows()
        for request in filter(self._may_go, self.queue.heads()):
            with self._ending_what_fails(request):
                if not self._router.has_credit() and self._place_on_recalled_row(request, givers, now):
                    givers = self.service.by_rows()

    def _place_on_recalled_row(self, request: Request, givers: Sequence[bytes], now: float) -> bool:
        if (found := self._recall.take(request, givers, self._fleet.ready.values())) is not None:
            self._dispatch(request, *found, now)
        return found is not None

    def _route(self, request: Request, now: float) -> ReplicaLink | None:
        executor = request.executor
        may_wait = executor.session_wait_until is None or now < executor.session_wait_until
        choice = self._fleet.route(request, num_requests=self.books.num_open, now=now, may_wait=may_wait)
        if isinstance(choice, ReplicaLink):
            return choice
        if choice is Verdict.WAIT_FOR_SESSION and executor.session_wait_until is None:
            executor.session_wait_until = now + self._settings.session_wait_s
            self._loop.call_at(executor.session_wait_until, self._schedule_pump)
        elif choice is Verdict.REFUSED_BY_ALL:
            *_, reason = executor.refused_by.values()
            message = f"every executor has refused the request, the last one: {reason}"
            self.end(request, request.make_finish(StatusError.unavailable(message, _RETRY_AFTER)))
        return None

    def _dispatch(self, request: Request, replica: ReplicaLink, victims: Sequence[Request], now: float) -> None:
        self.queue.remove(request)
        executor = request.executor
        is_first = executor.dispatches == 0
        if request.trace is not None:
            request.trace.dispatch(replica.address)
        cached = self._router.matched_tokens(executor.hashes, replica)
        replica.dispatch(request, now, cached, ahead=self.service.goes_ahead(request), in_place_of=victims)
        self.service.on_dispatch(request, is_first=is_first)
        self.quarantine.on_dispatch(request)
        self.books.dispatched += 1
        if is_first:
            self.books.queue_time.observe(request.times.admission_seconds)
        self._router.record(executor.hashes, replica)
        if request.session_id:
            self._affinity.record(request.session_id, replica.address)

    def _on_finish(self, request: Request, finish: link_pb2.Finish, replica: ReplicaLink) -> None:
        executor = request.executor
        if finish.status.code == _UNAVAILABLE:
            has_run = request.num_new_tokens > 0
            replica.release(executor.handle)
            if not finish.moved:
                # Without a new token the executor refuses requests, for instance because it drains; else it failed.
                executor.refused_by[replica.instance_id] = finish.status.message
            died_on = replica.instance_id if has_run and not finish.moved else ""
            self._move_all([request], StatusError.from_link(finish.status), died_on)
            return
        usage = finish.usage
        self._fleet.pools.lengths.observe(max(0, usage.prompt_tokens - usage.cached_tokens), usage.completion_tokens)
        if executor.num_resumed:
            finish.usage.num_resumed = executor.num_resumed
        finish.timings.executor_id = replica.address
        self.end(request, finish)

    def _move_all(self, requests: list[Request], error: StatusError, died_on: str) -> None:
        """Requeue requests that left their executor, or end those guilty of its death; died_on: the dead engine."""
        guilty: dict[Request, str] = {}
        if died_on:
            guilty = self.quarantine.on_engine_lost(requests, died_on, self._loop.time())
        for request in requests:
            if request.trace is not None:
                request.trace.come_back(error)
            self.service.settle(request)
            request.client.settle_stopping()
            if request in guilty:
                reason = StatusError(grpc.StatusCode.INTERNAL, f"{guilty[request]}; the last one: {error.message}")
                self.end(request, request.make_finish(reason))
            else:
                self._requeue(request, lost=bool(died_on) or request.num_new_tokens > 0)

    def _requeue(self, request: Request, *, lost: bool) -> None:
        client = request.client
        if client.cancelled is not None or client.progress.all_ended:
            self.end(request, request.make_finish(client.cancelled))
        elif (error := self.outages.refusal(request)) is not None:
            self.end(request, request.make_finish(error))
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
            # The executor enforces the deadline and reports exact usage. This timer ends the request if it does not.
            request.timer = self._loop.call_at(backstop, self._on_deadline, request)
            return
        where = "while the request waited for an executor" if request.executor.replica is None else "on the executor"
        error = StatusError(grpc.StatusCode.DEADLINE_EXCEEDED, f"the deadline passed {where}")
        self.abandon(request, error, link_pb2.ABORT_REASON_DEADLINE)
