"""Registration of public gRPC services, with common handling of malformed messages, errors, limits and the drain."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from scalellm.services.common.api_keys import Tenant
from scalellm.services.common.errors import StatusError
from scalellm.services.common.guarded import OnEnd, guarded
from scalellm.services.tokenizer.call_bytes import CallAccount, CallBytes
from scalellm.services.tokenizer.limits import MAX_ANSWER_BYTES

_Behaviour = Callable[[Any, grpc.aio.ServicerContext], Awaitable[Message | None]]
_Answering = Callable[[Any, grpc.aio.ServicerContext, CallAccount], Awaitable[None]]


class CallGate:
    """Counts the running calls, and refuses new ones once it is closed."""

    def __init__(self) -> None:
        self._running = 0
        self._closed = False
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def is_closed(self) -> bool:
        """True if new calls are refused."""
        return self._closed

    def enter(self) -> None:
        """Count a call that begins. Raises StatusError UNAVAILABLE if the gate is closed."""
        if self._closed:
            raise StatusError.unavailable("the service is shutting down", retry_after=1.0)
        self._running += 1
        self._idle.clear()

    def leave(self) -> None:
        """Count the end of a call that entered."""
        self._running -= 1
        if self._running == 0:
            self._idle.set()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Context of a call. Raises StatusError UNAVAILABLE if the gate is closed."""
        self.enter()
        try:
            yield
        finally:
            self.leave()

    async def drain(self, limit: float) -> int:
        """Close, wait up to `limit` seconds for running calls, and return how many remain."""
        self._closed = True
        try:
            async with asyncio.timeout(limit):
                await self._idle.wait()
        except TimeoutError:
            pass
        return self._running


TenantOf = Callable[[], Tenant]
"""Returns the tenant of the current call. Raises StatusError if the caller is not authorised."""

Admit = Callable[[Tenant], AbstractAsyncContextManager[None]]
"""Context of a call that counts as a request of its tenant. Raises StatusError if the tenant is over a limit."""

_VERDICT = 0.05
"""Seconds to wait for gRPC to cancel a call that ended before its message. It does so if the message was too long, and
reports that to the client itself."""

_FREE = frozenset({"GetInfo"})
"""Methods that count towards no limit, because they cost next to nothing."""


def add_service(
    server: grpc.aio.Server,
    service: ServiceDescriptor,
    servicer: object,
    gate: CallGate,
    on_end: OnEnd,
    held: CallBytes,
    tenant_of: TenantOf,
    admit: Admit | None = None,
) -> None:
    """Serve `service` with the methods of `servicer`, which raise StatusError for every outcome but OK, and apply their
    callers' limits themselves if `admit` is None.

    With the generated `add_..._to_server` functions, gRPC would answer a message that does not parse with INTERNAL;
    here it is INVALID_ARGUMENT, as it is the client's mistake. They would also leave answers to gRPC, which buffers
    them until the client reads them; here a call runs, and counts, until its answer was read.
    """
    handlers = {}
    for method in service.methods:
        answering = _answering(getattr(servicer, method.name))
        if admit is not None and method.name not in _FREE:
            answering = _admitted(answering, admit, tenant_of)
        # Registered as client-streaming, because otherwise gRPC does not call a handler if the client sends no message.
        handlers[method.name] = grpc.stream_stream_rpc_method_handler(
            guarded(_reading(answering, method, gate, held, tenant_of), method.full_name, on_end),
            request_deserializer=_lenient_parser(method),
            response_serializer=GetMessageClass(method.output_type).SerializeToString,
        )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.full_name, handlers),))


def check_answer(answer: Message) -> int:
    """Return the size of an answer in bytes. Raises StatusError if it exceeds the default limit of clients."""
    size = answer.ByteSize()
    if size > MAX_ANSWER_BYTES:
        message = f"the answer has {size} bytes, a message holds at most {MAX_ANSWER_BYTES}; ask for less at a time"
        raise StatusError(grpc.StatusCode.RESOURCE_EXHAUSTED, message)
    return size


def _lenient_parser(method: MethodDescriptor) -> Callable[[bytes], Message | None]:
    message_class = GetMessageClass(method.input_type)

    def parse(data: bytes) -> Message | None:
        try:
            return message_class.FromString(data)
        except DecodeError:
            return None

    return parse


def _answering(behaviour: _Behaviour) -> _Answering:
    """Wrap a method so that the answer that it returns is written. Streaming methods write their answers themselves."""

    async def call(request: Any, context: grpc.aio.ServicerContext, account: CallAccount) -> None:
        response = await behaviour(request, context)
        if response is not None:
            account.hold(check_answer(response))
            await context.write(response)  # returns once flow control has let the message pass

    return call


def _admitted(answering: _Answering, admit: Admit, tenant_of: TenantOf) -> _Answering:
    async def call(request: Any, context: grpc.aio.ServicerContext, account: CallAccount) -> None:
        async with admit(tenant_of()):
            await answering(request, context, account)

    return call


def _reading(
    answering: _Answering, method: MethodDescriptor, gate: CallGate, held: CallBytes, tenant_of: TenantOf
) -> Callable[[object, grpc.aio.ServicerContext], Awaitable[None]]:
    """Make a handler that reads its request itself and runs the method, unless the gate is closed."""
    name = method.input_type.full_name

    async def call(_: object, context: grpc.aio.ServicerContext) -> None:
        async with held.call(tenant_of().name, context.peer()) as account:
            async with account.reading():
                request = await context.read()
            with gate.running():
                if request is grpc.aio.EOF:
                    await asyncio.sleep(_VERDICT)
                    raise StatusError.invalid("request", f"is missing: the call has no {name}")
                if request is None:
                    raise StatusError.invalid(
                        "request", f"is not a valid {name}: malformed, or a string in it is not UTF-8"
                    )
                account.hold(request.ByteSize())
                await answering(request, context, account)

    return call
