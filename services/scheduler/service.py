"""scalellm.v1.Scheduler on gRPC."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc

from scalellm.v1 import link_pb2, scheduler_pb2
from services.common.errors import StatusError
from services.common.link import first_frame, lease_of, parse_client_frame, read_hello
from services.scheduler.affinity_store import AffinityStore
from services.scheduler.client_link import ClientLink
from services.scheduler.dispatcher import Dispatcher
from services.scheduler.executor_discovery import ExecutorDiscovery
from services.scheduler.fleet import Fleet

SERVICE = scheduler_pb2.DESCRIPTOR.services_by_name["Scheduler"]

_LONGEST_DRAIN = 3600


class SchedulerService:
    """Answers the RPCs.

    Args:
        instance_id: Names this incarnation of the scheduler.
        drain_limit: Seconds that Drain waits where the request does not say.
        dispatcher: Takes the requests.
        fleet: The executors.
        discovery: Their list.
        affinity: For the state of Redis.
        lease: Seconds for which the requests of a silent tokenizer worker are kept.
    """

    def __init__(
        self,
        instance_id: str,
        drain_limit: float,
        dispatcher: Dispatcher,
        fleet: Fleet,
        discovery: ExecutorDiscovery,
        affinity: AffinityStore,
        lease: float,
    ) -> None:
        self._instance_id = instance_id
        self._drain_limit = drain_limit
        self._lease = lease
        self._dispatcher = dispatcher
        self._fleet = fleet
        self._discovery = discovery
        self._affinity = affinity

    def get_state(self) -> scheduler_pb2.GetStateResponse:
        """Queue, executors and books at one instant."""
        state = scheduler_pb2.GetStateResponse(instance_id=self._instance_id, redis_ok=self._affinity.redis_ok)
        self._dispatcher.fill_state(state)
        state.executors.extend(replica.describe() for replica in self._fleet.replicas.values())
        for name, error in self._discovery.errors.items():
            phase = scheduler_pb2.EXECUTOR_PHASE_CONNECTING
            state.executors.add(address=name, phase=phase, last_error=error)
        return state

    async def Connect(self, frames: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> None:
        """Serve one tokenizer worker's link."""
        hello = read_hello(await first_frame(frames))
        welcome = await self._welcome(hello)
        link = ClientLink(hello.client_id, self._dispatcher.books)
        self._dispatcher.open_link(link)
        try:
            await link.server_link.run(
                link_pb2.ServerFrame(welcome=welcome).SerializeToString(),
                frames,
                context,
                lambda frame: self._on_frame(link, parse_client_frame(frame)),
                lease_of(hello, self._lease),
            )
        finally:
            self._dispatcher.close_link(link)

    async def _welcome(self, hello: link_pb2.Hello) -> link_pb2.Welcome:
        """Refuses the link while no executor is ready: a Welcome could not say what the client needs to know."""
        if self._dispatcher.is_draining:
            raise StatusError.unavailable("the scheduler is draining", retry_after=1.0)
        if not await self._fleet.wait_ready():
            raise self._fleet.make_outage()
        welcome = self._fleet.make_welcome(self._instance_id)
        if hello.tokenizer_sha256 and hello.tokenizer_sha256 != welcome.tokenizer_sha256:
            raise StatusError(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"tokenizer_sha256: the executors run {welcome.model!r} with tokenizer "
                f"{welcome.tokenizer_sha256.hex()[:12] or '(unknown)'}, the client's is "
                f"{hello.tokenizer_sha256.hex()[:12]}: its token ids would mean other texts",
                field="tokenizer_sha256",
            )
        return welcome

    def _on_frame(self, link: ClientLink, frame: link_pb2.ClientFrame) -> None:
        match frame.WhichOneof("frame"):
            case "submit":
                self._dispatcher.submit(link, frame.submit)
            case "abort":
                self._dispatcher.abort(link, frame.abort)
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
        self._dispatcher.begin_drain()
        return scheduler_pb2.DrainResponse(remaining=await self._dispatcher.wait_idle(limit))

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
