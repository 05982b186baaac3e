"""The downstream end of a link: reads client frames, writes merged frames one at a time."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Protocol

from scalellm.services.common.errors import StatusError
from scalellm.services.common.link.client_frames import parse_client_frame
from scalellm.services.common.link.traffic import LinkTraffic
from scalellm.services.common.silence import until_silent
from scalellm.v1 import link_pb2

# Far below gRPC's limit on a message, which would break the link of a reader that was slow for long.
_MERGE_BYTES = 1 << 20

_MOST_UNREAD = 16
"""Frames that are written and that the reader has not taken. What the transport holds is out of reach: small frames lay
there for seconds, each read by itself, before a busy reader saw the last one."""

_TAKEN_TAG = b"\x2a"
"""First byte of a frame that says `taken`: that field's number, and that its length follows."""


class FrameWriter(Protocol):
    """The methods of a gRPC context that a link uses."""

    async def write(self, message: bytes) -> None:
        """Send one message; returns when the transport took it."""


class ServerLink:
    """One link of an upstream process.

    Frames are serialised `ServerFrame` messages. While the reader is slow they pile up here as bytes and leave merged,
    about a megabyte at a time: concatenated protobuf messages parse as their merge, and StepOutput is made to be
    merged. So a slow reader costs memory bounded by the tokens of its own requests, never holds up the step loop, and
    has fewer frames to read the slower it is. A reader counts as slow when it has not taken the last few frames.

    Args:
        traffic: Counts what passes; default: an object of its own.
    """

    def __init__(self, traffic: LinkTraffic | None = None) -> None:
        self._traffic = traffic or LinkTraffic()
        self._pending: deque[bytes] = deque()
        self._wake = asyncio.Event()
        self._closed = False
        self._num_received = 0
        self._num_written = 0
        self._num_taken: int | None = None  # until the reader says: it may be of a version that does not

    @property
    def is_closed(self) -> bool:
        """True if nothing more can be sent."""
        return self._closed

    def send(self, frame: bytes) -> None:
        """Queue a frame with a StepOutput; never blocks."""
        if not self._closed:
            self._pending.append(frame)
            self._wake.set()

    def close(self) -> None:
        """End the link once what is pending has been written."""
        self._closed = True
        self._wake.set()

    async def run(
        self,
        welcome: bytes,
        frames: AsyncIterator[bytes],
        writer: FrameWriter,
        on_frame: Callable[[bytes], None],
        lease: float | None = None,
    ) -> None:
        """Serve the link until either side ends it.

        Args:
            welcome: Serialised ServerFrame with the Welcome; written first and alone.
            frames: The client's frames after its Hello.
            writer: The gRPC context.
            on_frame: Called for each client frame; what it raises ends the link.
            lease: Seconds without a client frame after which the link ends with UNAVAILABLE, be it that the client
                hangs or that its connection is half open; the client is told, and renews. None = it does not renew.
        """
        told = link_pb2.Welcome(counts_frames=True, lease_ns=int(lease * 1e9) if lease is not None else 0)
        welcome += link_pb2.ServerFrame(welcome=told).SerializeToString()  # merged by whoever parses it
        try:
            self._traffic.on_sent(welcome)
            await writer.write(welcome)
            await self._serve(frames, writer, on_frame, lease)
        finally:
            self._closed = True

    async def _serve(
        self,
        frames: AsyncIterator[bytes],
        writer: FrameWriter,
        on_frame: Callable[[bytes], None],
        lease: float | None,
    ) -> None:
        reading = asyncio.create_task(self._read(frames, on_frame))
        others = [asyncio.create_task(self._write(writer))]
        if lease is not None:
            others.append(asyncio.create_task(self._watch(lease)))
        try:
            done, _ = await asyncio.wait((reading, *others), return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            self._closed = True
            # Not cancelled: a message that comes for a read that gRPC has under way, and nobody waits for, is never
            # freed. The read ends with the call, which is over once this returns.
            reading.add_done_callback(_take_result)
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

    async def _read(self, frames: AsyncIterator[bytes], on_frame: Callable[[bytes], None]) -> None:
        async for frame in frames:
            if self._closed:
                return
            self._traffic.on_received(frame)
            self._num_received += 1
            if not self._is_count(frame):
                on_frame(frame)

    def _is_count(self, frame: bytes) -> bool:
        """Take note of what the reader has taken, if the frame says so. Raises StatusError, which ends the link."""
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
        """True if the reader has taken enough of what was written; it is not waited for at the end of the link."""
        return self._closed or self._num_taken is None or self._num_written - self._num_taken < _MOST_UNREAD

    async def _watch(self, lease: float) -> None:
        await until_silent(lease, lambda: self._num_received)
        raise StatusError.unavailable(f"the client of this link has not renewed its lease for {lease:g} s")

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
        return b"".join(frames)


def _take_result(task: asyncio.Task[None]) -> None:
    """Take how a task ended that nobody waits for, of which asyncio would complain."""
    if not task.cancelled():
        task.exception()
