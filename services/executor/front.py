"""The executor's front: gRPC outside, the engine process inside. It forwards frames without parsing them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial

import grpc

from scalellm.services.common.errors import StatusError
from scalellm.services.common.link import LinkTraffic, ServerLink, first_frame, lease_of, read_hello
from scalellm.services.executor.config import ExecutorSettings
from scalellm.services.executor.engine_supervisor import EngineSupervisor
from scalellm.v1 import executor_pb2

SERVICE = executor_pb2.DESCRIPTOR.services_by_name["Executor"]


class ExecutorServicer:
    """`scalellm.v1.Executor` on an engine process, for `link_service_handler`. The engine serialises each step once."""

    def __init__(self, supervisor: EngineSupervisor, settings: ExecutorSettings) -> None:
        self._supervisor = supervisor
        self._settings = settings

    async def Execute(self, frames: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> None:
        """Serve one scheduler's link."""
        port = _Port(self._supervisor.traffic)
        link = 0
        try:
            first = await first_frame(frames)
            lease = lease_of(read_hello(first), self._settings.lease_s)
            link = await self._supervisor.open_link(first, port)
            welcome = await port.welcome
            pass_on = partial(self._supervisor.send_frame, link)
            wait_for_room = partial(self._supervisor.wait_for_room, link)
            await port.link.run(welcome, frames, context, pass_on, lease, wait_for_room)
            if port.error is not None:
                raise port.error
        finally:
            self._supervisor.close_link(link)

    async def GetInfo(
        self, request: executor_pb2.GetExecutorInfoRequest, context: grpc.aio.ServicerContext
    ) -> executor_pb2.GetExecutorInfoResponse:
        """Return the loaded model and the request counts."""
        if not self._supervisor.info.instance_id:
            raise StatusError.unavailable("the engine is starting", retry_after=1.0)
        return self._supervisor.info

    async def Drain(
        self, request: executor_pb2.DrainExecutorRequest, context: grpc.aio.ServicerContext
    ) -> executor_pb2.DrainExecutorResponse:
        """Take no new requests and wait for the rest."""
        limit = request.timeout_s if request.HasField("timeout_s") else self._settings.drain_limit_s
        if limit > 3600:
            raise StatusError.invalid("timeout_s", f"must be at most 3600, got {limit}")
        return executor_pb2.DrainExecutorResponse(remaining=await self._supervisor.drain(limit))


class _Port:
    """The front's end of one link: passes the engine's messages to the gRPC stream."""

    def __init__(self, traffic: LinkTraffic) -> None:
        self.link = ServerLink(traffic)
        self.welcome: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self.error: StatusError | None = None

    def on_welcome(self, frame: bytes) -> None:
        if not self.welcome.done():  # else the client went away while it waited
            self.welcome.set_result(frame)

    def on_frame(self, frame: bytes) -> None:
        self.link.send(frame)

    def on_end(self, error: StatusError) -> None:
        self.error = error
        if not self.welcome.done():
            self.welcome.set_exception(error)
        self.link.close()
