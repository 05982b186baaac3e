"""The downstream end of a link: reads client frames, writes merged frames one at a time."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Protocol

from scalellm.v1 import link_pb2
from services.common.errors import StatusError
from services.common.link.traffic import LinkTraffic
from services.common.silence import until_silent

# Far below gRPC's limit on a message, which would break the link of a reader that was slow for long.
_MERGE_BYTES = 1 << 20


class FrameWriter(Protocol):
    """What a link needs of a gRPC context."""

    async def write(self, message: bytes) -> None:
        """Send one message; returns when the transport took it."""


class ServerLink:
    """One link of an upstream process.

    Frames are serialised `ServerFrame` messages. While the reader is slow they pile up here as bytes and leave merged,
    about a megabyte at a time: concatenated protobuf messages parse as their merge, and StepOutput is made to be
    merged. So a slow reader costs memory bounded by the tokens of its own requests, and never holds up the step loop.

    Args:
        traffic: Counts what passes; default: an object of its own.
    """

    def __init__(self, traffic: LinkTraffic | None = None) -> None:
        self._traffic = traffic or LinkTraffic()
        self._pending: deque[bytes] = deque()
        self._wake = asyncio.Event()
        self._closed = False
        self._num_received = 0

    @property
    def is_closed(self) -> bool:
        """Whether nothing more can be sent."""
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
        if lease is not None:
            told = link_pb2.Welcome(lease_ns=int(lease * 1e9))
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
            on_frame(frame)

    async def _watch(self, lease: float) -> None:
        await until_silent(lease, lambda: self._num_received)
        raise StatusError.unavailable(f"the client of this link has not renewed its lease for {lease:g} s")

    async def _write(self, writer: FrameWriter) -> None:
        while True:
            while self._pending:
                message = self._take()
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
