"""The downstream end of a link: reads client frames, writes merged frames one at a time."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Protocol

import grpc

from scalellm.services.common.errors import StatusError
from scalellm.services.common.link.client_frames import parse_client_frame
from scalellm.services.common.link.traffic import LinkTraffic
from scalellm.services.common.silence import until_silent
from scalellm.v1 import link_pb2

# Far below gRPC's limit of a message, which would break the link of a reader that was slow for long.
_MERGE_BYTES = 1 << 20

_MOST_PENDING_BYTES = 2**27
"""Most bytes of frames that wait for a reader, some millions of tokens. The tokens of running requests are limited by
themselves, but a client that sends requests which are refused gets an answer to each, and need not read them.
"""

_MOST_UNREAD = 16
"""Most written frames that the reader has not acknowledged. Frames in the transport can no longer be merged: without
this limit, thousands of small ones waited there for seconds before a busy reader saw the last one."""

_TAKEN_TAG = b"\x2a"
"""First byte of a serialised frame with `taken`: the field's number and wire type."""


class FrameWriter(Protocol):
    """The methods of a gRPC context that a link uses."""

    async def write(self, message: bytes) -> None:
        """Send one message. Returns once the transport has accepted it."""


class ServerLink:
    """The downstream end of one link.

    Frames are serialised `ServerFrame` messages. While the reader is slow they accumulate here as bytes and are sent
    merged, about a megabyte at a time: concatenated protobuf messages parse as their merge, and StepOutput is designed
    for that. So a slow reader costs memory bounded by the tokens of its own requests, never blocks the step loop, and
    has the fewer frames to read the slower it is. A reader is slow if it has not acknowledged the last few frames. One
    that is too far behind loses its link.

    Args:
        traffic: Counts messages and bytes; default: a new object.
    """

    def __init__(self, traffic: LinkTraffic | None = None) -> None:
        self._traffic = traffic or LinkTraffic()
        self._pending: deque[bytes] = deque()
        self._num_pending_bytes = 0
        self._is_full = asyncio.Event()
        self._wake = asyncio.Event()
        self._closed = False
        self._is_reading = True
        self._num_received = 0
        self._num_written = 0
        self._num_taken: int | None = None  # None until the first acknowledgement, since an older client sends none

    @property
    def is_closed(self) -> bool:
        """True if nothing more can be sent."""
        return self._closed

    def send(self, frame: bytes) -> None:
        """Queue a frame with a StepOutput, without blocking."""
        if self._closed or self._is_full.is_set():
            return
        self._pending.append(frame)
        self._num_pending_bytes += len(frame)
        if self._num_pending_bytes > _MOST_PENDING_BYTES:
            self._is_full.set()
        self._wake.set()

    def close(self) -> None:
        """End the link once the pending frames have been written."""
        self._closed = True
        self._wake.set()

    async def run(
        self,
        welcome: bytes,
        frames: AsyncIterator[bytes],
        writer: FrameWriter,
        on_frame: Callable[[bytes], None],
        lease: float | None = None,
        wait_for_room: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """Serve the link until either side ends it.

        Args:
            welcome: Serialised ServerFrame with the Welcome; written first and alone.
            frames: The client's frames after its Hello.
            writer: The gRPC context.
            on_frame: Called for each client frame. An exception ends the link.
            lease: Seconds without a client frame after which the link ends with UNAVAILABLE, because the client hangs
                or its connection is half open. The Welcome states it, and the client renews it. None = the client's
                version does not renew leases.
            wait_for_room: Waits after a frame until the next one may be read. gRPC's flow control then stops the
                client, which does not count as silent meanwhile. It must return once the link has ended. None = at
                once.
        """
        told = link_pb2.Welcome(counts_frames=True, lease_ns=int(lease * 1e9) if lease is not None else 0)
        welcome += link_pb2.ServerFrame(welcome=told).SerializeToString()  # the parser merges the two
        try:
            self._traffic.on_sent(welcome)
            await writer.write(welcome)
            await self._serve(frames, writer, on_frame, lease, wait_for_room)
        finally:
            self._closed = True

    async def _serve(
        self,
        frames: AsyncIterator[bytes],
        writer: FrameWriter,
        on_frame: Callable[[bytes], None],
        lease: float | None,
        wait_for_room: Callable[[], Awaitable[None]] | None,
    ) -> None:
        reading = asyncio.create_task(self._read(frames, on_frame, wait_for_room))
        others = [asyncio.create_task(self._write(writer)), asyncio.create_task(self._until_full())]
        if lease is not None:
            others.append(asyncio.create_task(self._watch(lease)))
        try:
            done, _ = await asyncio.wait((reading, *others), return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            self._closed = True
            # The reading task is not cancelled, because gRPC never frees a message that arrives for an abandoned read.
            # The read ends with the call, which is over once this returns.
            reading.add_done_callback(_take_result)
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

    async def _read(
        self,
        frames: AsyncIterator[bytes],
        on_frame: Callable[[bytes], None],
        wait_for_room: Callable[[], Awaitable[None]] | None,
    ) -> None:
        async for frame in frames:
            if self._closed:  # the pending frames are still to be written, so the link does not end here
                continue
            self._traffic.on_received(frame)
            self._num_received += 1
            if self._is_count(frame):
                continue
            on_frame(frame)
            if wait_for_room is not None:
                self._is_reading = False
                await wait_for_room()
                self._is_reading = True

    def _is_count(self, frame: bytes) -> bool:
        """Handle a frame that acknowledges frames (`taken`). Returns False for any other frame. Raises StatusError,
        which ends the link.
        """
        if not frame.startswith(_TAKEN_TAG):
            return False
        parsed = parse_client_frame(frame)
        if parsed.WhichOneof("frame") != "taken":
            return False
        least, count = self._num_taken or 0, parsed.taken.frames
        if not least <= count <= self._num_written:
            raise StatusError.invalid("taken.frames", f"must be in [{least}, {self._num_written}], got {count}")
        self._num_taken = count
        self._wake.set()
        return True

    @property
    def _may_write(self) -> bool:
        """True if few enough frames are unacknowledged. At the end of the link acknowledgements are not waited for."""
        return self._closed or self._num_taken is None or self._num_written - self._num_taken < _MOST_UNREAD

    async def _watch(self, lease: float) -> None:
        await until_silent(lease, lambda: self._num_received, lambda: self._is_reading)
        raise StatusError.unavailable(f"the client of this link has not renewed its lease for {lease:g} s")

    async def _until_full(self) -> None:
        await self._is_full.wait()
        message = f"frames: more than {_MOST_PENDING_BYTES} bytes wait for the client of this link to read them"
        raise StatusError(grpc.StatusCode.RESOURCE_EXHAUSTED, message)

    async def _write(self, writer: FrameWriter) -> None:
        while True:
            while self._pending and self._may_write:
                message = self._take()
                self._num_written += 1
                self._traffic.on_sent(message)
                await writer.write(message)
            if self._closed:
                return
            self._wake.clear()
            await self._wake.wait()

    def _take(self) -> bytes:
        frames = [self._pending.popleft()]
        size = len(frames[0])
        while self._pending and (size := size + len(self._pending[0])) <= _MERGE_BYTES:
            frames.append(self._pending.popleft())
        message = b"".join(frames)
        self._num_pending_bytes -= len(message)
        return message


def _take_result(task: asyncio.Task[None]) -> None:
    """Retrieve the exception of a task that nothing awaits, because asyncio would log it otherwise."""
    if not task.cancelled():
        task.exception()
