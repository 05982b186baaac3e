"""A fair queue of jobs for one worker. Callers take turns, and a caller that has left costs nothing."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar


@dataclass(slots=True, eq=False)
class Job:
    """A job of a caller.

    Attributes:
        caller: Name of the tenant whose turn it takes.
        result: Future that the caller waits for. It is done before the work has begun if the caller has left.
    """

    caller: str
    result: asyncio.Future[Any] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


JobT = TypeVar("JobT", bound=Job)


class Turns(Generic[JobT]):
    """A queue of jobs. Each caller's jobs are in order of arrival, and callers take turns, so that a caller with one
    job waits for at most one job of each other caller.
    """

    def __init__(self) -> None:
        self._queues: OrderedDict[str, OrderedDict[JobT, None]] = OrderedDict()  # in the order of turns
        self._arrived = asyncio.Event()

    async def finish(self, job: JobT) -> Any:
        """Add a job and wait for its result. A cancelled call removes its job."""
        self._queues.setdefault(job.caller, OrderedDict())[job] = None
        self._arrived.set()
        try:
            return await job.result
        finally:
            self._remove(job)

    def peek(self) -> JobT | None:
        """Return the next job without removing it; None if there is none."""
        while self._queues:
            job = next(iter(next(iter(self._queues.values()))))
            if not job.result.done():
                return job
            self._remove(job)  # its caller was cancelled, and has not removed it yet
        return None

    def pop(self) -> JobT:
        """Remove the job that `peek` returned; the turn goes to the next caller."""
        caller, queue = next(iter(self._queues.items()))
        job, _ = queue.popitem(last=False)
        if queue:
            self._queues.move_to_end(caller)
        else:
            del self._queues[caller]
        return job

    async def take(self) -> JobT:
        """Remove and return the next job, once there is one."""
        while self.peek() is None:
            self._arrived.clear()
            await self._arrived.wait()
        return self.pop()

    def cancel_all(self) -> None:
        """Cancel all jobs, so that their callers stop waiting."""
        while self.peek() is not None:
            self.pop().result.cancel()

    def _remove(self, job: JobT) -> None:
        queue = self._queues.get(job.caller)
        if queue is not None and job in queue:
            del queue[job]
            if not queue:
                del self._queues[job.caller]
