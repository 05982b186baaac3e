"""scalellm.v1.Scheduler on gRPC."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc

from scalellm.services.common.errors import StatusError
from scalellm.services.common.link import check_tokenizer, first_frame, lease_of, parse_client_frame, read_hello
from scalellm.services.scheduler.affinity_store import AffinityStore
from scalellm.services.scheduler.client_link import ClientLink
from scalellm.services.scheduler.executor_discovery import ExecutorDiscovery
from scalellm.services.scheduler.fleet import Fleet
from scalellm.services.scheduler.intake import Intake
from scalellm.services.scheduler.placement import Placement
from scalellm.v1 import link_pb2, scheduler_pb2

SERVICE = scheduler_pb2.DESCRIPTOR.services_by_name["Scheduler"]

_HELLO_PATIENCE = 5.0  # for a first executor; less than a client waits for its Welcome
_LONGEST_DRAIN = 3600


class SchedulerService:
    """Answers the RPCs.

    Args:
        instance_id: Names this incarnation of the scheduler.
        drain_limit: Seconds that Drain waits where the request does not say.
        intake: Takes the requests.
        placement: Sees them to their end.
        fleet: The executors.
        discovery: Their list.
        affinity: For the state of Redis.
        lease: Seconds for which the requests of a silent tokenizer worker are kept.
    """

    def __init__(
        self,
        instance_id: str,
        drain_limit: float,
        intake: Intake,
        placement: Placement,
        fleet: Fleet,
        discovery: ExecutorDiscovery,
        affinity: AffinityStore,
        lease: float,
    ) -> None:
        self._instance_id = instance_id
        self._drain_limit = drain_limit
        self._lease = lease
        self._intake = intake
        self._placement = placement
        self._fleet = fleet
        self._discovery = discovery
        self._affinity = affinity

    def get_state(self) -> scheduler_pb2.GetStateResponse:
        """Queue, executors and books at one instant."""
        books, queue = self._placement.books, self._placement.queue
        state = scheduler_pb2.GetStateResponse(
            instance_id=self._instance_id,
            queued=len(queue),
            queued_tokens=queue.num_tokens,
            running=self._fleet.num_running,
            accepted=books.accepted,
            finished=books.finished,
            cancelled=books.cancelled,
            rejected=books.rejected,
            resubmitted=books.resubmitted,
            draining=self._intake.is_draining,
            redis_ok=self._affinity.redis_ok,
        )
        state.executors.extend(replica.describe() for replica in self._fleet.replicas.values())
        state.pools.extend(self._fleet.pools.describe())
        for name, error in self._discovery.errors.items():
            phase = scheduler_pb2.EXECUTOR_PHASE_CONNECTING
            state.executors.add(address=name, phase=phase, last_error=error)
        return state

    async def Connect(self, frames: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> None:
        """Serve one tokenizer worker's link."""
        hello = read_hello(await first_frame(frames))
        welcome = await self._welcome(hello)
        link = ClientLink(hello.client_id, self._placement.books)
        self._intake.open_link(link)
        try:
            await link.server_link.run(
                link_pb2.ServerFrame(welcome=welcome).SerializeToString(),
                frames,
                context,
                lambda frame: self._on_frame(link, parse_client_frame(frame)),
                lease_of(hello, self._lease),
            )
        finally:
            self._intake.close_link(link)

    async def _welcome(self, hello: link_pb2.Hello) -> link_pb2.Welcome:
        """Refuses the link while no executor is ready: a Welcome could not say what the client needs to know."""
        if self._intake.is_draining:
            raise StatusError.unavailable("the scheduler is draining", retry_after=1.0)
        await self._placement.outage.wait_decided(_HELLO_PATIENCE)
        welcome = self._fleet.make_welcome(self._instance_id)
        check_tokenizer(hello, welcome)
        return welcome

    def _on_frame(self, link: ClientLink, frame: link_pb2.ClientFrame) -> None:
        match frame.WhichOneof("frame"):
            case "submit":
                self._intake.submit(link, frame.submit)
            case "abort":
                self._intake.abort(link, frame.abort)
            case "renewal":
                pass  # that it came is what counts: the edge has credits without end
            case "hello":
                raise StatusError.invalid("hello", "a link is opened once")
            case _:
                raise StatusError.invalid("frame", "is empty or of an unknown kind")

    async def GetState(
        self, request: scheduler_pb2.GetStateRequest, context: grpc.aio.ServicerContext
    ) -> scheduler_pb2.GetStateResponse:
        """Queue, executors and books."""
        return self.get_state()

    async def Drain(
        self, request: scheduler_pb2.DrainRequest, context: grpc.aio.ServicerContext
    ) -> scheduler_pb2.DrainResponse:
        """Admit nothing more and wait for the rest."""
        limit = request.timeout_s if request.HasField("timeout_s") else self._drain_limit
        if limit > _LONGEST_DRAIN:
            raise StatusError.invalid("timeout_s", f"{limit} is above {_LONGEST_DRAIN}")
        self._intake.begin_drain()
        return scheduler_pb2.DrainResponse(remaining=await self._placement.wait_idle(limit))

    async def AddExecutor(
        self, request: scheduler_pb2.AddExecutorRequest, context: grpc.aio.ServicerContext
    ) -> scheduler_pb2.AddExecutorResponse:
        """An executor joins."""
        try:
            await self._discovery.add([request.address])
        except ValueError as error:
            raise StatusError.invalid("address", str(error)) from None
        return scheduler_pb2.AddExecutorResponse()

    async def RemoveExecutor(
        self, request: scheduler_pb2.RemoveExecutorRequest, context: grpc.aio.ServicerContext
    ) -> scheduler_pb2.RemoveExecutorResponse:
        """An executor leaves."""
        if not self._discovery.remove(request.address):
            message = f"address: {request.address!r} is not a known executor"
            raise StatusError(grpc.StatusCode.NOT_FOUND, message)
        return scheduler_pb2.RemoveExecutorResponse()
