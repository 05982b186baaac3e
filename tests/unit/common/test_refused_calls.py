"""Calls that are refused, fail or are cancelled leave nothing in memory, also without the garbage collector."""

from __future__ import annotations

import asyncio
import gc
import logging
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message

from scalellm.services.common.access import Access
from scalellm.services.common.api_keys import Tenant
from scalellm.services.common.errors import StatusError
from scalellm.services.common.lifecycle import GrpcService
from scalellm.services.common.link import link_service_handler
from scalellm.services.executor.front import SERVICE as EXECUTOR
from scalellm.services.executor.front import ExecutorServicer
from scalellm.services.scheduler.service import SERVICE as SCHEDULER
from scalellm.services.scheduler.service import SchedulerService
from scalellm.services.tokenizer.call_bytes import CallBytes
from scalellm.services.tokenizer.rpc import CallGate, add_service
from scalellm.v1 import executor_pb2, generation_pb2, link_pb2, scheduler_pb2
from service_processes import PATIENCE, eventually

GENERATION = generation_pb2.DESCRIPTOR.services_by_name["Generation"]
CALLS = 5


class Held:
    """Stands for what the frames of a call hold: its request above all."""


class Servicer:
    """Ends every call as its prompt says."""

    def __init__(self) -> None:
        self.held: weakref.WeakSet[Held] = weakref.WeakSet()
        self.num_calls = 0

    async def Generate(self, request: generation_pb2.GenerateRequest, context: grpc.aio.ServicerContext) -> None:
        self.num_calls += 1
        held = Held()
        self.held.add(held)
        try:
            await self._end(request.prompt)
        except Exception as error:
            failure = error  # as the real one keeps it: error, traceback and frame are a cycle
            assert failure
            raise

    async def Resume(self, request: generation_pb2.ResumeRequest, context: grpc.aio.ServicerContext) -> None:
        raise AssertionError("nobody calls it")

    Cancel = Resume

    async def _end(self, how: str) -> None:
        if how == "cancelled":
            await asyncio.sleep(PATIENCE)
        try:
            raise RuntimeError("a mistake")
        except RuntimeError:
            if how == "failed":
                raise
            raise StatusError.invalid("prompt", "is refused") from None


class Supervisor:
    """An executor's engine that takes no links."""

    traffic = None

    async def open_link(self, hello: bytes, port: object) -> int:
        raise StatusError.unavailable("the engine is starting")

    def close_link(self, link: int) -> None:
        assert link == 0


@pytest.fixture(autouse=True)
def neither_garbage_collector_nor_log() -> Iterator[None]:
    logging.disable()  # a record holds the traceback, and tests collect records
    gc.collect()
    gc.disable()
    yield
    gc.enable()
    logging.disable(logging.NOTSET)


@asynccontextmanager
async def serving(**options: Any) -> AsyncIterator[tuple[GrpcService, grpc.aio.Channel]]:
    service = GrpcService("127.0.0.1", 0, services=[], is_ready=lambda: True, **options)
    await service.start()
    try:
        async with grpc.aio.insecure_channel(service.address) as channel:
            yield service, channel
    finally:
        await service.stop(0)


async def call_often(
    channel: grpc.aio.Channel, method: str, request: bytes, reached: Callable[[], int] | None = None
) -> set[grpc.StatusCode]:
    """Return the codes of a few calls; they leave no task and no connection behind.

    Args:
        channel: To the server.
        method: Full name of the method.
        request: Bytes to send.
        reached: Returns how many calls have reached the servicer; if given, each call is cancelled once it has.
    """
    num_tasks = len(asyncio.all_tasks())
    codes = set()
    for number in range(1, CALLS + 1):
        call = channel.unary_stream(method)(request, timeout=PATIENCE)
        if reached is not None:
            await eventually(lambda number=number: reached() == number)
            call.cancel()
        codes.add(await call.code())
    await eventually(lambda: len(asyncio.all_tasks()) <= num_tasks)
    return codes


def errors_in_memory() -> int:
    return sum(isinstance(thing, StatusError) for thing in gc.get_objects())


async def no_more_errors_in_memory_than(before: int) -> None:
    """The last call's may go a moment after its task."""
    await eventually(lambda: errors_in_memory() <= before)


@pytest.mark.parametrize(
    ("how", "code"),
    [
        ("refused", grpc.StatusCode.INVALID_ARGUMENT),
        ("failed", grpc.StatusCode.INTERNAL),
        ("cancelled", grpc.StatusCode.CANCELLED),
    ],
)
async def test_requests(how: str, code: grpc.StatusCode) -> None:
    servicer, request = Servicer(), generation_pb2.GenerateRequest(prompt=how).SerializeToString()
    async with serving() as (service, channel):
        add_service(
            service.server,
            GENERATION,
            servicer,
            CallGate(),
            lambda method, code: None,
            CallBytes(),
            lambda: Tenant("acme"),
        )
        reached = (lambda: servicer.num_calls) if how == "cancelled" else None
        assert await call_often(channel, "/scalellm.v1.Generation/Generate", request, reached) == {code}
        assert servicer.num_calls == CALLS
        await eventually(lambda: len(servicer.held) == 0)


@pytest.mark.parametrize(
    ("method", "request_"),
    [
        ("Scheduler/Connect", link_pb2.ClientFrame(abort=link_pb2.Abort())),
        ("Scheduler/Drain", scheduler_pb2.DrainRequest(timeout_s=9999)),
        ("Executor/Execute", link_pb2.ClientFrame()),
        ("Executor/Drain", executor_pb2.DrainExecutorRequest(timeout_s=9999)),
    ],
)
async def test_links(method: str, request_: Message) -> None:
    servicers: dict[str, tuple[Any, Any]] = {
        "Scheduler": (SCHEDULER, SchedulerService("", 0.0, None, None, None, 0.0)),  # type: ignore[arg-type]
        "Executor": (EXECUTOR, ExecutorServicer(Supervisor(), None)),  # type: ignore[arg-type]
    }
    async with serving() as (service, channel):
        service.server.add_generic_rpc_handlers((link_service_handler(*servicers[method.split("/")[0]]),))
        before = errors_in_memory()
        codes = await call_often(channel, f"/scalellm.v1.{method}", request_.SerializeToString())
        assert codes <= {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNAVAILABLE}
        await no_more_errors_in_memory_than(before)


async def test_callers_who_are_not_known(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("x" * 64)
    access = Access(link_token_file=tmp_path / "token")
    async with serving(interceptors=access.interceptors) as (_, channel):
        before = errors_in_memory()
        codes = await call_often(channel, "/scalellm.v1.Scheduler/Connect", b"")
        assert codes == {grpc.StatusCode.UNAUTHENTICATED}
        await no_more_errors_in_memory_than(before)
