"""Snapshots once a second for whoever watches, and nothing at all while nobody does."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import grpc

from scalellm.services.common.errors import StatusError

_MOST_WATCHERS = 64


class FleetWatch:
    """One taking of snapshots for all that watch. A slow reader misses some, and holds nobody up.

    Args:
        take: Makes a snapshot.
        forget: Called when the last watcher has left.
        interval: Seconds between snapshots.
        most: Watchers at once.
    """

    def __init__(
        self,
        take: Callable[[], Awaitable[bytes]],
        forget: Callable[[], Awaitable[None]],
        interval: float = 1.0,
        most: int = _MOST_WATCHERS,
    ) -> None:
        self._take = take
        self._forget = forget
        self._interval = interval
        self._most = most
        self._num_watchers = 0
        self._next: asyncio.Future[bytes] | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def num_watchers(self) -> int:
        """Watchers now."""
        return self._num_watchers

    @contextlib.asynccontextmanager
    async def watching(self) -> AsyncIterator[Callable[[], Awaitable[bytes]]]:
        """Give what waits for the next snapshot. Raises StatusError RESOURCE_EXHAUSTED where too many watch."""
        if self._num_watchers >= self._most:
            raise StatusError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"at most {self._most} clients can watch the fleet at one worker",
                retry_after=5.0,
            )
        self._num_watchers += 1
        if self._task is None:
            self._next = asyncio.get_running_loop().create_future()
            self._task = asyncio.create_task(self._run(), name="fleet watch")
        try:
            yield self._wait
        finally:
            self._num_watchers -= 1
            if not self._num_watchers:
                await self._stop()

    async def _wait(self) -> bytes:
        assert self._next is not None
        return await asyncio.shield(self._next)

    async def _stop(self) -> None:
        task, self._task = self._task, None
        assert task is not None
        task.cancel()
        # The task itself forgets: this call may be cancelled, as its client has gone. `wait` does not pass that on.
        await asyncio.wait([task])

    async def _run(self) -> None:
        try:
            await self._take_for_ever()
        finally:
            if self._task is None:  # otherwise somebody came meanwhile
                await self._forget()

    async def _take_for_ever(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + self._interval
            assert self._next is not None
            waited_for, following = self._next, loop.create_future()
            try:
                taken = await self._take()
            except Exception as error:
                self._next = following
                waited_for.set_exception(error)
                waited_for.exception()  # seen, also where nobody waits just now
            else:
                self._next = following
                waited_for.set_result(taken)
            await asyncio.sleep(max(0.0, due - loop.time()))
