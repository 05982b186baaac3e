"""The kept requests of one worker."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import grpc

from scalellm.services.common.api_keys import Tenant
from scalellm.services.common.errors import StatusError
from scalellm.services.common.logs import LineLimit
from scalellm.services.tokenizer.kept.journal import Entry, Head, Journal, Written, no_request
from scalellm.services.tokenizer.kept.kept_request import KeptRequest
from scalellm.services.tokenizer.latency import LatencyTrace
from scalellm.services.tokenizer.prompt_builder import Prompt
from scalellm.services.tokenizer.quotas import Lease
from scalellm.services.tokenizer.rpc import CallGate
from scalellm.services.tokenizer.session import Session
from scalellm.v1 import generation_pb2

if TYPE_CHECKING:
    from scalellm.services.tokenizer.generation.edge import Edge
    from scalellm.services.tokenizer.generation.edges import Edges

_log = logging.getLogger(__name__)

_TICK = 0.05
"""Seconds between two writes to the journals."""

_WRITE_BYTES = 2**20
"""Bytes of results after which a round trip ends and the next one begins. All that came while Redis was away, in a
single one, would be too late for the client's time limit, and again the next time, with more.
"""

_LAST_WRITES = 2.0
"""Seconds in which a worker that stops tells the journals so. Without that, the leases on its requests expire."""

_RETRY = 1.0
"""Seconds until the next attempt after Redis did not answer."""


class KeptRequests:
    """Finds and starts kept requests, and writes their journals while `run` runs.

    Args:
        journal: Journal that they are written to; None: the service has no Redis, and no request is kept.
        gate: Counts those that run, so that draining waits for them.
        lease: Seconds that the journal's lease lasts.
    """

    def __init__(self, journal: Journal | None, gate: CallGate, lease: float) -> None:
        self._journal = journal
        self._gate = gate
        self._renew_every = lease / 3
        self._by_id: dict[tuple[str, str], KeptRequest] = {}
        self._all: set[KeptRequest] = set()
        self._log_limit = LineLimit()
        self._writing = asyncio.Lock()

    @property
    def num_failures(self) -> int:
        """Number of failed Redis operations."""
        return self._journal.num_failures if self._journal is not None else 0

    @property
    def num_running(self) -> int:
        """Number of requests that this worker runs."""
        return sum(kept.is_here and not kept.transcript.is_over for kept in self._all)

    @property
    def num_unwritten(self) -> int:
        """Number of running requests whose last write failed, so that they cannot be resumed in another worker."""
        return sum(kept.is_here and not kept.is_journaled for kept in self._all)

    async def find(self, edges: Edges, tenant: Tenant, request_id: str) -> KeptRequest:
        """Return a request by its id, whichever worker runs or ran it. Raises StatusError NOT_FOUND, UNAVAILABLE, and
        FAILED_PRECONDITION if its model is no longer served.
        """
        if self._journal is None:
            raise StatusError(
                grpc.StatusCode.FAILED_PRECONDITION, "no requests are kept: the service was started without --redis-url"
            )
        kept = self._known(tenant, request_id)
        if kept is None:
            kept = self._follow(edges, tenant, request_id, await self._journal.head(tenant, request_id))
        if kept is None:
            raise no_request(request_id)
        return kept

    async def model_of(self, tenant: Tenant, request_id: str) -> str:
        """Return the model of the request with an id; empty: there is none, or Redis does not answer."""
        if (kept := self._by_id.get((tenant.name, request_id))) is not None:
            return kept.edge.model_name
        try:
            head = await self._journal.head(tenant, request_id) if self._journal is not None else None
        except StatusError:
            return ""
        return head.started.model if head is not None else ""

    async def cancel(self, edges: Edges, tenant: Tenant, request_id: str) -> KeptRequest:
        """Cancel a request in any worker; see KeptRequest.cancel. Raises StatusError NOT_FOUND, UNAVAILABLE."""
        kept = await self.find(edges, tenant, request_id)
        await kept.cancel()
        return kept

    async def forget(self, edges: Edges, tenant: Tenant, request_id: str) -> None:
        """Cancel a request and remove its journal. Raises StatusError NOT_FOUND, UNAVAILABLE."""
        kept = await self.cancel(edges, tenant, request_id)
        await asyncio.wait((kept.stop(),))  # a later write would create its journal again
        if self._journal is not None and (reading := await self._journal.read(tenant, request_id)) is not None:
            await self._journal.forget(tenant, request_id, reading.execution, reading.fence)

    async def find_same(
        self, edge: Edge, tenant: Tenant, request: generation_pb2.GenerateRequest
    ) -> KeptRequest | None:
        """Return the kept request that was begun by an earlier sending of this one; None if it is new, or Redis does
        not answer.

        Raises StatusError ALREADY_EXISTS if another request was begun with the same id; UNAVAILABLE if the service is
        shutting down, as another worker has to follow it; FAILED_PRECONDITION as `find` does.
        """
        if self._journal is None:
            return None
        kept = self._known(tenant, request.request_id)
        if kept is None:
            try:
                head = await self._journal.head(tenant, request.request_id)
            except StatusError:
                return None
            kept = self._follow(edge.models, tenant, request.request_id, head)
        if kept is not None:
            kept.head.check_same(request)
        return kept

    async def begin(
        self,
        edge: Edge,
        tenant: Tenant,
        head: Head,
        time_left: float | None,
        *,
        lease: Lease | None,
        trace: LatencyTrace,
        prompt: Prompt,
        session: Session | None,
    ) -> KeptRequest | None:
        """Begin a kept request. Returns None if it cannot be kept: Redis does not answer, or its tenant's limit is
        reached.

        If another call has meanwhile begun the same request, that one is returned, and the lease is not used. Raises
        StatusError ALREADY_EXISTS if another request was begun with the same id. For the arguments see KeptRequest.
        """
        if self._journal is None:
            return None
        try:
            outcome = await self._journal.create(tenant, head, 1, time_left)
        except StatusError as error:
            if self._log_limit.admit() is not None:
                _log.warning("request %s cannot be kept: %s", head.request_id, error.message)
            return None
        if outcome in (Written.TAKEN, Written.OTHER):
            return await self.find_same(edge, tenant, head.request)
        if outcome is not Written.DONE:
            edge.metrics.count_limited("kept_bytes")
            return None
        kept = KeptRequest(
            edge,
            self._journal,
            self._writing,
            tenant,
            head,
            fence=1,
            lease=lease,
            trace=trace,
            prompt=prompt,
            session=session,
        )
        try:
            self._start(kept)
        except StatusError:  # the service is shutting down
            with contextlib.suppress(StatusError):
                await self._journal.forget(tenant, head.request_id, head.submit.execution_id, 1)
            raise
        return kept

    async def run(self) -> None:
        """Write the journals until cancelled."""
        if self._journal is None:
            await asyncio.Event().wait()
        while True:
            await asyncio.sleep(_TICK)
            async with self._writing:
                is_written = await self._write()
            if not is_written:
                await asyncio.sleep(_RETRY)

    async def stop(self) -> None:
        """Give up the running requests, so that other workers can take them over at once, or once the leases on them
        have expired if Redis does not answer in `_LAST_WRITES` seconds.
        """
        if stopping := [kept.stop() for kept in self._all]:
            _, late = await asyncio.wait(stopping, timeout=_LAST_WRITES)
            if late:
                _log.warning("%d requests are taken over only when their leases expire: Redis is slow", len(late))

    async def _write(self) -> bool:
        """Write all due entries, in as many round trips as they need. Returns False if Redis failed."""
        due, num_bytes = [], 0
        for kept in tuple(self._all):
            if (entry := kept.entry(self._renew_every)) is None:
                continue
            due.append((kept, entry))
            num_bytes += len(entry.step)
            if num_bytes >= _WRITE_BYTES:
                if not await self._write_once(due):
                    return False
                due, num_bytes = [], 0
        return await self._write_once(due)

    async def _write_once(self, due: Sequence[tuple[KeptRequest, Entry]]) -> bool:
        """Write entries in one round trip. Returns False if Redis failed."""
        assert self._journal is not None
        try:
            outcomes = await self._journal.write([entry for _, entry in due])
            for (kept, entry), (outcome, num_bytes) in zip(due, outcomes, strict=True):
                await kept.wrote(entry, outcome, num_bytes)
        except StatusError as error:
            for kept, entry in due:
                await kept.wrote(entry, None)
            if self._log_limit.admit() is not None:
                _log.warning("%d requests cannot be resumed elsewhere now: %s", len(due), error.message)
            return False
        return True

    def _known(self, tenant: Tenant, request_id: str) -> KeptRequest | None:
        kept = self._by_id.get((tenant.name, request_id))
        return kept if kept is not None and kept.has_its_id else None

    def _follow(self, edges: Edges, tenant: Tenant, request_id: str, head: Head | None) -> KeptRequest | None:
        """Return a request, which is followed by its head in the journal unless it was begun here during the look-up.

        None: it has no head, so there is none. Raises StatusError UNAVAILABLE, FAILED_PRECONDITION as `find` does.
        """
        if (kept := self._known(tenant, request_id)) is not None or head is None:
            return kept
        assert self._journal is not None
        kept = KeptRequest(edges.serving(head.started.model), self._journal, self._writing, tenant, head)
        self._start(kept)
        return kept

    def _start(self, kept: KeptRequest) -> None:
        self._gate.enter()
        self._all.add(kept)
        self._by_id[kept.tenant.name, kept.head.request_id] = kept
        kept.start(self._ended)

    def _ended(self, kept: KeptRequest) -> None:
        self._gate.leave()
        self._all.discard(kept)
        key = (kept.tenant.name, kept.head.request_id)
        if self._by_id.get(key) is kept:
            del self._by_id[key]
