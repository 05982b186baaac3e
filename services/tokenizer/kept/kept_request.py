"""One kept request in one worker, which runs it, or follows it while another worker runs it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import grpc

from scalellm.services.common.api_keys import Tenant
from scalellm.services.common.errors import StatusError
from scalellm.services.common.field_rules import MIN_PRIORITY
from scalellm.services.tokenizer.kept.journal import Entry, Head, Journal, Written, no_request
from scalellm.services.tokenizer.kept.run import Run
from scalellm.services.tokenizer.kept.transcript import Transcript
from scalellm.services.tokenizer.kept.written_part import WrittenPart
from scalellm.services.tokenizer.latency import LatencyTrace
from scalellm.services.tokenizer.prompt_builder import Prompt
from scalellm.services.tokenizer.quotas import Lease
from scalellm.services.tokenizer.session import Session
from scalellm.v1 import generation_pb2

if TYPE_CHECKING:
    from scalellm.services.tokenizer.generation.edge import Edge

_log = logging.getLogger(__name__)

_POLL = 0.1
"""Seconds between two looks at the journal of a request that runs elsewhere."""

_LAST_WRITES = 60.0
"""Seconds after a request's end for which the worker tries to complete its journal while Redis does not answer."""

_MAX_ABORTED = 3
"""Number of ABORTED ends of a request after which it is given up instead of started again."""

_CANCEL_WAIT = 10.0
"""Seconds to wait for another worker to cancel a request. Workers check for that at least once a second."""

_CANCELLED = StatusError(grpc.StatusCode.CANCELLED, "the request was cancelled")

_GONE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.ABORTED)
"""Statuses after which a request can go on elsewhere, or later."""

_REFUSALS = (
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
)
"""Statuses of requests that did not run, if they have no tokens."""


class KeptRequest:
    """Runs a request; or follows it in its journal until it ends, or until its worker is gone, and then runs it.

    Args:
        edge: The worker, and the model of the request.
        journal: Journal that it is written to.
        writing: Held while journals are written, as an entry states the length of its tail before the write.
        tenant: The tenant.
        head: The request.
        fence: 1 for a new request, which runs here; 0: it runs, or ran, in another worker.
        lease: Lease of a new request on its tenant's quotas.
        trace: Trace of a new request.
        prompt: Prompt of a new request, for its session.
        session: Session that a new request continues.

    Attributes:
        transcript: Its results.
        num_followers: Calls that read it.
        was_refused: True if it was refused before it ran, so that its id is free.
        was_replaced: True if its id stands for another execution, which a client began after Redis lost the journal.
        is_left: True if it is followed no longer, because its last reader has left. New readers need another one.
        is_journaled: True if the last write to its journal succeeded.
    """

    def __init__(
        self,
        edge: Edge,
        journal: Journal,
        writing: asyncio.Lock,
        tenant: Tenant,
        head: Head,
        *,
        fence: int = 0,
        lease: Lease | None = None,
        trace: LatencyTrace | None = None,
        prompt: Prompt | None = None,
        session: Session | None = None,
    ) -> None:
        self.edge = edge
        self._journal = journal
        self._writing = writing
        self.tenant = tenant
        self.head = head
        self._fence = fence
        self._lease = lease
        self._trace = trace
        self._prompt = prompt
        self._session = session
        submit = head.submit
        self._time_left = submit.time_remaining_ns / 1e9 if submit.HasField("time_remaining_ns") else None
        self._timed_at = time.monotonic()
        self.transcript = Transcript(head.submit)
        self.num_followers = 0
        self.is_journaled = fence > 0
        self._written_part = WrittenPart(tenant, head, self.transcript)
        self._end_is_written = False
        self._writes_nothing = False
        self._written = asyncio.Event()
        self._accepted = asyncio.Event()
        self.was_refused = False
        self.was_replaced = False
        self.is_left = False
        if not fence:
            self._accepted.set()
        self._is_cancelled = False
        self._is_known = asyncio.Event()
        self._owning: asyncio.Task[None] | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def is_here(self) -> bool:
        """True if this worker runs, or ran, the request."""
        return self._fence > 0

    @property
    def has_its_id(self) -> bool:
        """True while its id stands for it."""
        return not (self.was_refused or self.was_replaced or self.is_left)

    def start(self, on_end: Callable[[KeptRequest], None]) -> None:
        """Start running or following it; `on_end` is called when that has ended and its journal is complete."""
        self._task = asyncio.create_task(self._run(), name=f"kept {self.head.request_id}")
        self._task.add_done_callback(lambda _: on_end(self))

    def stop(self) -> asyncio.Task[None]:
        """Give the request up, so that other workers can take it over. Returns the task that does so."""
        assert self._task is not None
        self._task.cancel()
        return self._task

    async def cancel(self) -> None:
        """Cancel the request in any worker, and wait for its end. Raises StatusError NOT_FOUND, UNAVAILABLE."""
        nothing = [0] * len(self.transcript.samples)
        with self.followed(), self.transcript.reader(nothing, min_tokens=1) as reader:
            if self.is_here:
                self._cancel_here()
            elif not self.transcript.is_over and not await self._journal.cancel(self.tenant, self.head.request_id):
                raise no_request(self.head.request_id)
            try:
                async with asyncio.timeout(_CANCEL_WAIT):
                    while not self.transcript.is_over:
                        await reader.wait()
            except TimeoutError:
                raise StatusError.unavailable(
                    f"request_id: {self.head.request_id!r} is about to be cancelled, but its worker is slow", 1.0
                ) from None

    @contextmanager
    def followed(self) -> Iterator[None]:
        """Context of a reader. A request that another worker runs is followed only while it has readers."""
        self.num_followers += 1
        try:
            yield
        finally:
            self.num_followers -= 1
            if not self.num_followers and not self.is_here and self._task is not None:
                self.is_left = True
                self._task.cancel()

    async def look(self) -> None:
        """Wait until the transcript has all results that are known by now, even of a request that runs elsewhere."""
        if not self.is_here:
            with self.followed():
                await self._is_known.wait()

    async def wait_accepted(self) -> None:
        """Wait until the request counts as accepted. Raises StatusError if it was refused."""
        await self._accepted.wait()
        if self.was_refused and self.transcript.error is not None:
            raise StatusError.from_link(self.transcript.error)

    # Writing to the journal.

    def entry(self, renew_every: float) -> Entry | None:
        """Return the entry to write to the journal now, or None. `wrote` must follow."""
        if not self.is_here or self._writes_nothing or self._end_is_written:
            return None
        part = self._written_part
        entry = part.next_entry(self._fence, self.transcript.finished or self.transcript.error)
        is_due = entry.step or entry.end is not None or time.monotonic() >= part.renewed_at + renew_every
        return entry if is_due else None

    async def wrote(self, entry: Entry, outcome: Written | None, num_bytes: int = 0) -> None:
        """Handle the outcome of a write (None = Redis did not answer), after which the tail has `num_bytes` bytes."""
        if entry.fence != self._fence:
            return  # this worker has lost the request since, and may have taken it over again
        self.is_journaled = outcome in (Written.DONE, Written.CANCELLED)
        if outcome is None:
            return
        part = self._written_part
        part.renewed_at = time.monotonic()
        if self.is_journaled:
            part.wrote(num_bytes)
            self._end_is_written = entry.end is not None
            if self._end_is_written:
                self._written.set()
            if outcome is Written.CANCELLED:
                self._cancel_here()
        elif outcome is Written.GONE:
            part.forget()
            left = self._seconds_left()
            created = await self._journal.create(self.tenant, self.head, self._fence, left, part.num_writes)
            if created is not Written.DONE:
                self._write_no_more(created)
        else:
            self._write_no_more(outcome)

    def _write_no_more(self, outcome: Written) -> None:
        if outcome is Written.TAKEN and self._owning is not None and not self.transcript.is_over:
            _log.warning("another worker has taken request %s over", self.head.request_id)
            self._fence = 0
            self._owning.cancel()
            return
        self.was_replaced = outcome is Written.OTHER
        _log.warning("request %s is not kept any longer: %s", self.head.request_id, outcome.name.lower())
        self._writes_nothing = True
        self._written.set()

    def _cancel_here(self) -> None:
        """End the request, which this worker runs, because its tenant cancelled it."""
        if not self.transcript.is_over:
            self._is_cancelled = True
            if self._owning is not None:
                self._owning.cancel()

    # Its life.

    async def _run(self) -> None:
        aborted = 0
        try:
            while not self.transcript.is_over:
                if not self.is_here:
                    await self._follow_elsewhere()
                    continue
                if self._is_cancelled:
                    self.transcript.end(_CANCELLED.to_link())
                    self._accepted.set()
                    continue
                self._owning = asyncio.create_task(self._own())
                try:
                    await asyncio.shield(self._owning)
                except asyncio.CancelledError:
                    assert self._task is not None
                    if self._task.cancelling():  # this task itself is being stopped
                        self._owning.cancel()
                        await asyncio.gather(self._owning, return_exceptions=True)
                        raise
                except StatusError as error:
                    aborted += 1
                    if error.code is not grpc.StatusCode.ABORTED or aborted >= _MAX_ABORTED:
                        raise
                    self._fence = 0  # another worker runs it, or it starts again after the lease
            if self.is_here:
                await self._wait_written()
        except StatusError as error:
            await self._give_up(error)
        except asyncio.CancelledError:
            await self._give_up(StatusError.unavailable("the server is shutting down; resume the request", 0.0))
            raise
        except Exception as error:
            _log.exception("request %s failed; its clients get INTERNAL", self.head.request_id)
            error.__traceback__ = None
            await self._give_up(StatusError(grpc.StatusCode.INTERNAL, "internal error; the server's log says more"))
        finally:
            self._end_lease()

    def _end_lease(self) -> None:
        if self._lease is not None:
            self._lease.end(self._num_used)
            self._lease = None

    @property
    def _num_used(self) -> int:
        """Tokens of the prompt and the answer so far; 0 for a refused request."""
        return 0 if self.was_refused else len(self.head.submit.token_ids) + self.transcript.num_tokens

    async def _follow_elsewhere(self) -> None:
        """Read the journal until the request has ended, or this worker has taken it over."""
        self._end_lease()
        num_bytes, edition = 0, ""
        while True:
            reading = await self._journal.read(self.tenant, self.head.request_id, num_bytes, edition)
            if reading is None:
                raise no_request(self.head.request_id)
            self._written_part.apply(reading, self.transcript)
            num_bytes, edition = reading.num_bytes, reading.edition
            if not reading.is_whole:
                continue
            if reading.end is None:
                self._is_known.set()
            else:
                if isinstance(reading.end, generation_pb2.Finished) and not self.transcript.has_all:
                    raise no_request(self.head.request_id)
                self.transcript.end(reading.end)
                self._is_known.set()
                return
            if reading.lease_left <= 0:
                fence = await self._journal.take(self.tenant, self.head.request_id, reading.execution, reading.fence)
                if fence:
                    await self._take_over(fence, reading.time_left)
                    self._is_cancelled |= reading.is_cancelled  # a Cancel may have come meanwhile
                    return
            await asyncio.sleep(_POLL)
            if not self.num_followers:
                self.is_left = True
                raise asyncio.CancelledError

    async def _take_over(self, fence: int, time_left: float | None) -> None:
        """Prepare to run the request here, after reading all writes of its old worker, which is fenced off."""
        await self._written_part.read_all(self._journal)
        self._fence, self._time_left, self._timed_at = fence, time_left, time.monotonic()
        self._trace, self._prompt, self._session = None, None, None
        self._end_is_written = self._writes_nothing = False
        self.edge.metrics.taken_over.inc()
        if self._lease is None:
            try:
                priority = max(self.head.request.priority, MIN_PRIORITY)
                self._lease = await self.edge.quotas.admit(self.tenant, priority)
            except StatusError:
                pass  # it was admitted before, and its old worker may still hold that lease
            if self._lease is not None:
                self._lease.go_on(self._num_used)
        _log.info("request %s goes on here after %d tokens", self.head.request_id, self.transcript.num_tokens)

    async def _own(self) -> None:
        """Run the request to its end. Raises StatusError if it can go on elsewhere or later."""
        self._trace = self._trace or LatencyTrace()
        run = Run(self.edge, self.tenant, self.head, self.transcript, self._trace, self._prompt, self._session)
        try:
            await run.run(self._fence, self._seconds_left(), self._accepted)
        except StatusError as error:
            if not self._is_cancelled:
                await self._fail(error)

    def _seconds_left(self) -> float | None:
        return self._time_left - (time.monotonic() - self._timed_at) if self._time_left is not None else None

    async def _fail(self, error: StatusError) -> None:
        """Handle an error of the scheduler. Raises StatusError if the request can go on elsewhere or later."""
        # Without tokens it was refused in the queue. With `asked`, clients may ask for its state, so the error is kept.
        is_refusal = error.code in _REFUSALS and not self.transcript.num_tokens and not self.head.asked
        if is_refusal or not self._accepted.is_set():
            # A refused request did not run: its id is free, and the client may send it again.
            self._writes_nothing = True
            self._written.set()
            with contextlib.suppress(StatusError):
                submit = self.head.submit
                await self._journal.forget(self.tenant, submit.request_id, submit.execution_id, self._fence)
            self._refuse(error)
            return
        if error.code in _GONE:
            raise error
        self.transcript.end(error.to_link())

    async def _wait_written(self) -> None:
        """Wait up to `_LAST_WRITES` seconds until the end is in the journal."""
        try:
            async with asyncio.timeout(_LAST_WRITES):
                await self._written.wait()
        except TimeoutError:
            _log.warning("request %s has ended and is not kept: Redis does not answer", self.head.request_id)

    async def _give_up(self, error: StatusError) -> None:
        """End the readers with an error, and let other workers take the request over at once."""
        if not self.transcript.is_over:
            self.transcript.end(error.to_link())
        self._is_known.set()
        if not self._accepted.is_set():
            self._refuse(error)
        if not self.is_here:
            return
        async with self._writing:  # after the write that is under way
            is_due = self.is_here and not self._writes_nothing and not self._end_is_written
            self._writes_nothing = True
        if is_due:
            end = self.transcript.finished or (self.transcript.error if error.code not in _GONE else None)
            with contextlib.suppress(StatusError):  # without these writes its lease expires
                await self._written_part.write_rest(self._journal, self._fence, end)

    def _refuse(self, error: StatusError) -> None:
        self.transcript.end(error.to_link())
        self.was_refused = True
        self._accepted.set()
