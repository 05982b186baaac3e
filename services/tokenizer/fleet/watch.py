"""Snapshots once a second for all watchers. None are taken while there are no watchers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import grpc

from scalellm.services.common.errors import StatusError

_MOST_WATCHERS = 64


class FleetWatch:
    """Takes each snapshot once for all watchers. A slow reader misses some, and delays no others.

    Args:
        take: Makes a snapshot.
        forget: Called when the last watcher has left.
        interval: Seconds between snapshots.
        most: Most watchers at once.
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
        """Number of current watchers."""
        return self._num_watchers

    @contextlib.asynccontextmanager
    async def watching(self) -> AsyncIterator[Callable[[], Awaitable[bytes]]]:
        """Context of a watcher, with a function that waits for the next snapshot. Raises StatusError RESOURCE_EXHAUSTED
        if there are too many watchers.
        """
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
        # The task itself calls `forget`, because this call may be cancelled when its client leaves. `asyncio.wait` does
        # not pass that cancellation on to the task.
        await asyncio.wait([task])

    async def _run(self) -> None:
        try:
            await self._take_for_ever()
        finally:
            if self._task is None:  # else a new watcher has come meanwhile
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
                waited_for.exception()  # mark the exception as retrieved, in case nobody waits now
            else:
                self._next = following
                waited_for.set_result(taken)
            await asyncio.sleep(max(0.0, due - loop.time()))
