"""Flow control of a link's frames between the front and the engine.

gRPC's flow control ends at the front, and the engine reads only between two steps. So the front passes on as many
frames of a link as fit into a window, and reads no more from that link until the engine has taken some in; gRPC then
stops the client. Other links have windows of their own.
"""

from __future__ import annotations

import asyncio

WINDOW = 2**20
"""Cost of the frames of a link that may be on their way to the engine. The last one may exceed it."""

_PER_FRAME = 2**12


def frame_cost(frame: bytes) -> int:
    """Return the cost of a frame: its bytes, and as much for the frame itself as lets 256 small ones fit into a window,
    which an engine takes in within some milliseconds.
    """
    return len(frame) + _PER_FRAME


class FrameWindow:
    """The front's end of one link's window."""

    def __init__(self) -> None:
        self._room = WINDOW
        self._has_room = asyncio.Event()
        self._has_room.set()
        self._is_closed = False

    def take(self, frame: bytes) -> None:
        """Count a frame that is passed on."""
        self._room -= frame_cost(frame)
        if self._room <= 0 and not self._is_closed:
            self._has_room.clear()

    def give(self, cost: int) -> None:
        """Count frames that the engine has taken in, by their cost."""
        self._room += cost
        if self._room > 0:
            self._has_room.set()

    def close(self) -> None:
        """Let those go on that wait for room: the link has ended, and passes nothing on any more."""
        self._is_closed = True
        self._has_room.set()

    async def wait(self) -> None:
        """Wait until another frame may be passed on."""
        await self._has_room.wait()


class TakenFrames:
    """The engine's end of one link's window."""

    def __init__(self) -> None:
        self._untold = 0

    def add(self, frame: bytes) -> int:
        """Count a frame that was taken in. Returns the cost to tell the front; 0: it is not worth a message yet."""
        self._untold += frame_cost(frame)
        if self._untold < WINDOW // 2:
            return 0
        told, self._untold = self._untold, 0
        return told
