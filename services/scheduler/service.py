"""scalellm.v1.Scheduler on gRPC."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Iterable

import grpc

from scalellm.services.common.errors import StatusError
from scalellm.services.common.link import check_tokenizer, first_frame, lease_of, parse_client_frame, read_hello
from scalellm.services.scheduler.affinity_store import AffinityStore
from scalellm.services.scheduler.client_link import ClientLink
from scalellm.services.scheduler.dispatcher import Dispatcher
from scalellm.services.scheduler.dispatchers import Dispatchers
from scalellm.services.scheduler.executor_discovery import ExecutorDiscovery
from scalellm.services.scheduler.intake import Intake
from scalellm.services.scheduler.unserved import Unserved
from scalellm.v1 import link_pb2, scheduler_pb2

SERVICE = scheduler_pb2.DESCRIPTOR.services_by_name["Scheduler"]

_HELLO_PATIENCE = 5.0  # seconds to wait for a first executor; less than a client waits for its Welcome
_LONGEST_DRAIN = 3600


class SchedulerService:
    """Answers the RPCs.

    Args:
        instance_id: Names this incarnation of the scheduler.
        drain_limit: Seconds that Drain waits where the request does not say.
        dispatchers: One for each model.
        discovery: The listed names of executors.
        affinity: Source of the state of Redis.
        lease: Seconds for which the requests of a silent tokenizer worker are kept.
    """

    def __init__(
        self,
        instance_id: str,
        drain_limit: float,
        dispatchers: Dispatchers,
        discovery: ExecutorDiscovery,
        affinity: AffinityStore,
        lease: float,
    ) -> None:
        self._instance_id = instance_id
        self._drain_limit = drain_limit
        self._lease = lease
        self._dispatchers = dispatchers
        self._discovery = discovery
        self._affinity = affinity
        self._unserved = Unserved()

    def get_state(self) -> scheduler_pb2.GetStateResponse:
        """Return the queue, executors and counts at one instant."""
        models = [dispatcher.describe() for dispatcher in self._dispatchers]
        state = scheduler_pb2.GetStateResponse(
            instance_id=self._instance_id,
            queued=sum(model.queued for model in models),
            queued_tokens=sum(model.queued_tokens for model in models),
            running=sum(model.running for model in models),
            accepted=sum(model.accepted for model in models),
            finished=sum(model.finished for model in models),
            cancelled=sum(model.cancelled for model in models),
            rejected=sum(model.rejected for model in models),
            resubmitted=sum(dispatcher.placement.books.resubmitted for dispatcher in self._dispatchers),
            draining=self._dispatchers.is_draining,
            redis_ok=self._affinity.redis_ok,
            models=(model for model in models if model.model),
            clients=client_states(link for dispatcher in self._dispatchers for link in dispatcher.intake.links),
        )
        state.executors.extend(replica.describe() for replica in self._dispatchers.replicas.values())
        for dispatcher in self._dispatchers:
            for pool in dispatcher.fleet.pools.describe():
                pool.model = dispatcher.model
                state.pools.append(pool)
        for name, error in self._discovery.errors.items():
            phase = scheduler_pb2.EXECUTOR_PHASE_CONNECTING
            state.executors.add(address=name, phase=phase, last_error=error)
        return state

    async def Connect(self, frames: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> None:
        """Serve one tokenizer worker's link."""
        hello = read_hello(await first_frame(frames))
        dispatcher, welcome = await self._welcome(hello)
        intake = dispatcher.intake
        books = dispatcher.placement.books
        link = ClientLink(hello.client_id, books, service=hello.service, takes_any_model=not hello.model)
        intake.open_link(link)
        try:
            await link.server_link.run(
                link_pb2.ServerFrame(welcome=welcome).SerializeToString(),
                frames,
                context,
                lambda frame: _on_frame(intake, link, parse_client_frame(frame)),
                lease_of(hello, self._lease),
            )
        finally:
            intake.close_link(link)

    async def _welcome(self, hello: link_pb2.Hello) -> tuple[Dispatcher, link_pb2.Welcome]:
        """Choose the dispatcher of a new link and make its Welcome. Raises StatusError UNAVAILABLE while no executor is
        ready, because the Welcome has to contain the executors' limits.
        """
        if self._dispatchers.is_draining:
            raise StatusError.unavailable("the scheduler is draining", retry_after=1.0)
        if self._unserved.has_more(hello):
            self._dispatchers.turn_away(hello.model)
        dispatcher = await self._dispatchers.find(hello, _HELLO_PATIENCE)
        welcome = dispatcher.fleet.make_welcome(self._instance_id)
        check_tokenizer(hello, welcome)
        return dispatcher, welcome

    async def GetState(
        self, request: scheduler_pb2.GetStateRequest, context: grpc.aio.ServicerContext
    ) -> scheduler_pb2.GetStateResponse:
        """Return the queue, executors and counts."""
        return self.get_state()

    async def Drain(
        self, request: scheduler_pb2.DrainRequest, context: grpc.aio.ServicerContext
    ) -> scheduler_pb2.DrainResponse:
        """Refuse new requests and wait for the open ones to end."""
        limit = request.timeout_s if request.HasField("timeout_s") else self._drain_limit
        if limit > _LONGEST_DRAIN:
            raise StatusError.invalid("timeout_s", f"{limit} is above {_LONGEST_DRAIN}")
        self._dispatchers.begin_drain()
        return scheduler_pb2.DrainResponse(remaining=await self._dispatchers.wait_idle(limit))

    async def AddExecutor(
        self, request: scheduler_pb2.AddExecutorRequest, context: grpc.aio.ServicerContext
    ) -> scheduler_pb2.AddExecutorResponse:
        """Add executors by name or address."""
        try:
            await self._discovery.add([request.address])
        except ValueError as error:
            raise StatusError.invalid("address", str(error)) from None
        return scheduler_pb2.AddExecutorResponse()

    async def RemoveExecutor(
        self, request: scheduler_pb2.RemoveExecutorRequest, context: grpc.aio.ServicerContext
    ) -> scheduler_pb2.RemoveExecutorResponse:
        """Remove an executor by name or address."""
        if not self._discovery.remove(request.address):
            message = f"address: {request.address!r} is not a known executor"
            raise StatusError(grpc.StatusCode.NOT_FOUND, message)
        return scheduler_pb2.RemoveExecutorResponse()


def client_states(links: Iterable[ClientLink]) -> list[scheduler_pb2.ClientState]:
    """Return one entry for each tokenizer service, in the order of their names. A worker may have several links."""
    workers: dict[str, set[str]] = {}
    running = Counter[str]()
    for link in links:
        workers.setdefault(link.service, set()).add(link.client_id)
        running[link.service] += len(link.requests)
    return [
        scheduler_pb2.ClientState(service=service, workers=len(ids), running=running[service])
        for service, ids in sorted(workers.items())
    ]


def _on_frame(intake: Intake, link: ClientLink, frame: link_pb2.ClientFrame) -> None:
    match frame.WhichOneof("frame"):
        case "submit":
            intake.submit(link, frame.submit)
        case "abort":
            intake.abort(link, frame.abort)
        case "renewal":
            pass  # a Renewal only has to arrive, to renew the lease; clients have unlimited credit
        case "hello":
            raise StatusError.invalid("hello", "a link is opened once")
        case _:
            raise StatusError.invalid("frame", "is empty or of an unknown kind")
