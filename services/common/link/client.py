"""The upstream end of a link: connects, performs the handshake, and reconnects after a loss."""

from __future__ import annotations

import asyncio
import logging
import random
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, Protocol, TypeVar

import grpc
from google.protobuf.descriptor import MethodDescriptor

from scalellm.services.common.cancellation import cancellable
from scalellm.services.common.errors import StatusError
from scalellm.services.common.guarded import drop_tracebacks
from scalellm.services.common.link.dialer import PLAINTEXT, LinkDialer
from scalellm.services.common.link.server_frames import read_step, read_welcome
from scalellm.services.common.link.traffic import LinkTraffic
from scalellm.services.common.reload import ConfigFileError
from scalellm.services.common.silence import until_silent
from scalellm.v1 import link_pb2

_log = logging.getLogger(__name__)

FrameT = TypeVar("FrameT")

_FIRST_DELAY, _LONGEST_DELAY = 0.05, 2.0
_HANDSHAKE_LIMIT = 10.0

_FRAMES_PER_COUNT = 8
"""Number of received frames after which they are acknowledged. Fewer than the peer sends without an acknowledgement."""

_RENEWALS_PER_LEASE = 6
_DEMAND_PAUSE = 0.05
"""Least seconds between two renewals, however often the demand changes."""


class LinkHandler(Protocol):
    """The user of a link. Its methods are called on the event loop, one at a time, and must not block.

    Frames have passed all checks that do not depend on the requests; see `server_frames`.
    """

    def on_up(self, welcome: link_pb2.Welcome) -> None:
        """Handle the peer's Welcome. May raise StatusError to refuse the peer."""

    def on_step(self, step: link_pb2.StepOutput) -> None:
        """Handle a frame with the results of one or more steps."""

    def on_down(self, error: StatusError) -> None:
        """Handle the loss of the link, with all requests on it, or a failed attempt to connect.

        With UNAVAILABLE, `error.retry_after` is set if and only if the peer itself sent a time to retry.
        """


class LinkClient:
    """Keeps one link to one address open until `run` is cancelled.

    Args:
        address: host:port of the peer.
        method: The link's RPC.
        hello: The first frame of each connection.
        handler: The user of the link.
        dialer: Dialer of the connection.
        silence_limit: Seconds without any frame, while `is_busy()`, after which the peer counts as dead although its
            connection stands (a process that hangs).
        is_busy: Returns whether an answer of the peer is due.
        demand: Returns the requests that wait for credits. It is sent with each renewal of the lease.
        traffic: Counts messages and bytes, over all connections; default: a new object.
    """

    def __init__(
        self,
        address: str,
        method: MethodDescriptor,
        hello: link_pb2.Hello,
        handler: LinkHandler,
        *,
        dialer: LinkDialer = PLAINTEXT,
        silence_limit: float = 30.0,
        is_busy: Callable[[], bool] = lambda: False,
        demand: Callable[[], link_pb2.Renewal] = link_pb2.Renewal,
        traffic: LinkTraffic | None = None,
    ) -> None:
        self.address = address
        self._path = f"/{method.containing_service.full_name}/{method.name}"
        self._hello = hello
        self._handler = handler
        self._dialer = dialer
        self._silence_limit = silence_limit
        self._is_busy = is_busy
        # Submits by their handles, Aborts by handle and sample: an Abort that is repeated while the peer does not read
        # takes no more room, and the Submit of a request that has ended meanwhile takes none.
        self._outbox: OrderedDict[int | tuple[int, int | None], link_pb2.ClientFrame] = OrderedDict()
        # only the latest, so that they do not accumulate while the peer does not read
        self._renewal: link_pb2.Renewal | None = None
        self._counts_frames = False
        self._num_read = 0
        self._count_due = False
        self._demand = demand
        self._demand_changed = asyncio.Event()
        self._wake = asyncio.Event()
        self._up = False
        self._last_reason = ""
        self._num_heard = 0
        self.traffic = traffic or LinkTraffic()

    @property
    def is_up(self) -> bool:
        """True if frames can be sent now."""
        return self._up

    def submit(self, submit: link_pb2.Submit) -> None:
        """Send a request. Must be called only while the link is up."""
        self._send(submit.handle, link_pb2.ClientFrame(submit=submit))

    def withdraw(self, handle: int) -> bool:
        """Take back a request whose Submit has not left. Returns False if it has: only an Abort ends that request."""
        return self._outbox.pop(handle, None) is not None

    def abort(self, handle: int, reason: link_pb2.AbortReason, index: int | None = None) -> None:
        """End a request, or one sample of it. Does nothing while the link is down, because the peer has lost it."""
        abort = link_pb2.Abort(handle=handle, index=index, reason=reason)
        self._send((handle, index), link_pb2.ClientFrame(abort=abort))

    def announce_demand(self) -> None:
        """Send the current demand with a renewal soon."""
        self._demand_changed.set()

    def _send(self, key: int | tuple[int, int | None], frame: link_pb2.ClientFrame) -> None:
        if self._up:
            self._outbox[key] = frame
            self._wake.set()

    async def run(self) -> None:
        """Connect, serve the link, and reconnect when it is lost, until cancelled."""
        now = asyncio.get_running_loop().time
        delay = _FIRST_DELAY
        while True:
            began = now()
            try:
                with cancellable():
                    await self._connect_once()
                error = StatusError.unavailable(f"{self.address} closed the link")
            except StatusError as status_error:
                error = status_error
                drop_tracebacks(error)
            except grpc.aio.AioRpcError as rpc_error:
                message, metadata = f"{self.address}: {rpc_error.details()}", rpc_error.trailing_metadata()
                error = StatusError.from_rpc(rpc_error.code(), message, metadata or ())
                drop_tracebacks(rpc_error)
            except ConfigFileError as file_error:
                error = StatusError(grpc.StatusCode.UNAUTHENTICATED, f"{self.address}: {file_error}")
            except Exception as unexpected:  # a bug in the handler ends the connection, but not the link
                _log.exception("link to %s failed", self.address)
                error = StatusError(grpc.StatusCode.INTERNAL, f"{self.address}: {unexpected!r}")
                drop_tracebacks(unexpected)
            # Logged once, and not at every attempt, because a peer may be away for hours.
            level = logging.WARNING if self._up or error.message != self._last_reason else logging.DEBUG
            _log.log(level, "link to %s is down, connecting again: %s", self.address, error.message)
            self._last_reason = error.message
            if self._up:
                delay = _FIRST_DELAY
            self._up = False
            self._outbox.clear()
            self._renewal = None
            self._count_due = False
            try:
                self._handler.on_down(error)
            except Exception:  # as above: it must not keep the link from connecting again
                _log.exception("the loss of the link to %s was not handled", self.address)
            # The delay counts from the beginning of the last attempt, because a starting peer lets its callers wait
            # already. The jitter prevents the links of many processes from reconnecting at the same time.
            await asyncio.sleep(max(_FIRST_DELAY, delay - (now() - began)) * random.uniform(0.8, 1.2))
            delay = min(delay * 2, _LONGEST_DELAY)

    async def _connect_once(self) -> None:
        async with self._dialer.open_channel(self.address) as channel:
            # The stream transmits bytes; messages are serialised here, where they are counted.
            call = channel.stream_stream(self._path)(metadata=self._dialer.metadata())
            try:
                await self._send_frame(call, link_pb2.ClientFrame(hello=self._hello))
                try:
                    async with asyncio.timeout(_HANDSHAKE_LIMIT):
                        first = await call.read()
                except TimeoutError:
                    raise StatusError.unavailable(f"{self.address} does not answer") from None
                if first is grpc.aio.EOF:
                    # The peer's status, if it sent one, is more specific.
                    await self._raise_status(call)
                    raise StatusError.unavailable(f"{self.address} did not answer with a Welcome")
                welcome = self._take(first, read_welcome)
                self._handler.on_up(welcome)
                self._counts_frames, self._num_read = welcome.counts_frames, 0
                self._up = True
                _log.info("link to %s is up: %s", self.address, welcome.model)
                await self._serve(call, welcome)
            finally:
                call.cancel()

    async def _serve(self, call: Any, welcome: link_pb2.Welcome) -> None:
        # The writer comes first, because its error is more specific than the reader's if one event ended both.
        steps = [self._write(call), self._read(call, partial(read_step, vocab_size=welcome.vocab_size)), self._watch()]
        if welcome.lease_ns:
            steps.append(self._renew(welcome.lease_ns / 1e9))
        tasks = [asyncio.create_task(step) for step in steps]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                if task.done():
                    task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self, call: Any, read: Callable[[bytes], link_pb2.StepOutput]) -> None:
        while (message := await call.read()) is not grpc.aio.EOF:
            self._handler.on_step(self._take(message, read))
            self._num_read += 1
            if self._counts_frames and self._num_read % _FRAMES_PER_COUNT == 0:
                self._count_due = True
                self._wake.set()
        await self._raise_status(call)

    def _take(self, message: bytes, read: Callable[[bytes], FrameT]) -> FrameT:
        self.traffic.on_received(message)
        self._num_heard += 1
        try:
            return read(message)
        except StatusError as error:
            raise StatusError(error.code, f"{self.address} sent a {error.message}") from None

    async def _send_frame(self, call: Any, frame: link_pb2.ClientFrame) -> None:
        message = frame.SerializeToString()
        self.traffic.on_sent(message)
        await call.write(message)

    async def _raise_status(self, call: Any) -> None:
        """Wait for the end of a call and raise StatusError with its status, unless that is OK."""
        code = await call.code()
        if code is not grpc.StatusCode.OK:
            message = f"{self.address}: {await call.details()}"
            raise StatusError.from_rpc(code, message, await call.trailing_metadata() or ())

    async def _write(self, call: Any) -> None:
        while True:
            while (frame := self._next_frame()) is not None:
                try:
                    await self._send_frame(call, frame)
                except grpc.aio.AioRpcError:
                    # If the peer ends the call while a frame is being written, gRPC reports INTERNAL instead of the
                    # peer's status, which is lost. The next attempt is due at once and will show the peer's state. (A
                    # Hello is not written here, because it fails if no service listens, which gRPC reports correctly.)
                    raise StatusError.unavailable(f"{self.address} ended the link", retry_after=0.0) from None
                except asyncio.InvalidStateError:  # the peer ended the call, and the reader has not noticed yet
                    await self._raise_status(call)
                    return
            self._wake.clear()
            await self._wake.wait()

    def _next_frame(self) -> link_pb2.ClientFrame | None:
        if self._count_due:
            self._count_due = False
            return link_pb2.ClientFrame(taken=link_pb2.Taken(frames=self._num_read))
        if self._outbox:
            return self._outbox.popitem(last=False)[1]
        renewal, self._renewal = self._renewal, None
        return link_pb2.ClientFrame(renewal=renewal) if renewal is not None else None

    async def _renew(self, lease: float) -> None:
        while True:
            self._renewal = self._demand()
            self._wake.set()
            # Not asyncio.wait_for, because in Python 3.11 it loses a cancellation that comes together with the event.
            # This task, and the link that waits for it, would then never end.
            with suppress(TimeoutError):
                async with asyncio.timeout(lease / _RENEWALS_PER_LEASE):
                    await self._demand_changed.wait()
            self._demand_changed.clear()
            await asyncio.sleep(_DEMAND_PAUSE)

    async def _watch(self) -> None:
        await until_silent(self._silence_limit, lambda: self._num_heard, self._is_busy)
        raise StatusError.unavailable(f"{self.address} has been silent for {self._silence_limit:g} s")
