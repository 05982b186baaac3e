"""Journals in Redis: the state from which any worker can go on with a kept request, and its results so far.

One script creates a journal, and one script call per tick and request appends to it. No token waits for them.
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from redis.asyncio import Redis
from redis.exceptions import NoScriptError

from scalellm.services.common.api_keys import Tenant
from scalellm.services.common.cancellation import cancellable
from scalellm.services.common.errors import StatusError
from scalellm.services.common.redis_client import KEY_PREFIX
from scalellm.services.common.redis_health import REDIS_ERRORS, RedisFault
from scalellm.services.tokenizer.kept import journal_script
from scalellm.services.tokenizer.kept.journal_tail import whole_steps
from scalellm.v1 import generation_pb2, link_pb2

_WRITE_SHA = hashlib.sha1(journal_script.WRITE.encode(), usedforsecurity=False).hexdigest()

_RETRY_AFTER = 1.0

_PIECE_BYTES = 2**16
"""Bytes of a tail that are read at once: some milliseconds of work for the event loop."""


class Written(enum.Enum):
    """The outcome of a write."""

    DONE = 1
    CANCELLED = 2
    """The write is done, and the request's tenant has cancelled the request."""
    TAKEN = 0
    """Another worker has taken the request over."""
    FULL = -1
    """The tenant's journals would exceed their limit, so this request's journal was dropped or not created."""
    GONE = -2
    """The journal no longer exists, because Redis lost it, or a part of it."""
    OTHER = -3
    """The id stands for another execution: another call has begun the request, or a client sent it again after Redis
    lost its journal."""


@dataclass(frozen=True, slots=True)
class Head:
    """The facts about a request that are known from its beginning.

    Attributes:
        digest: Digest of the request, by which another request with the same id is recognised.
        request: The client's request.
        submit: The first Submit to the scheduler.
        started: The first event.
        session_version: Version of the session that it continues; empty for a new one, and without.
        asked: The client's request in the format of its own API, from which the answer can be written in that API;
            empty for an API that cannot ask for an answer by its id alone.
    """

    digest: bytes
    request: generation_pb2.GenerateRequest
    submit: link_pb2.Submit
    started: generation_pb2.Started
    session_version: str = ""
    asked: bytes = b""

    @property
    def request_id(self) -> str:
        """The request's id."""
        return self.submit.request_id

    def check_same(self, request: generation_pb2.GenerateRequest) -> None:
        """Raise StatusError ALREADY_EXISTS unless `request` is the same request sent again."""
        if self.digest != digest(request):
            raise StatusError(
                grpc.StatusCode.ALREADY_EXISTS,
                f"request_id: {request.request_id!r} stands for a request with other parameters, which is still kept; "
                "choose another id",
            )


@dataclass(frozen=True, slots=True)
class Reading:
    """The contents of a journal at one moment.

    Attributes:
        execution: Id of the execution that the journal is of.
        fence: Rises with each worker that takes the request over.
        lease_left: Milliseconds for which no other worker may take the request over.
        time_left: Seconds until the deadline; None: it has none.
        end: The last event, or the status; None while the request has not ended.
        is_cancelled: True if its tenant has cancelled it.
        edition: Another one each time that the journal is created.
        steps: Its next results from the position from which it was read; if the edition is another one, from the
            beginning.
        num_bytes: Position to read on from.
        is_whole: False if there are more results now.
    """

    execution: bytes
    fence: int
    lease_left: int
    time_left: float | None
    end: generation_pb2.Finished | link_pb2.LinkStatus | None
    is_cancelled: bool
    edition: str
    steps: link_pb2.StepOutput
    num_bytes: int
    is_whole: bool = True


@dataclass(frozen=True, slots=True)
class Entry:
    """A write to one request's journal. An empty one renews the lease.

    Attributes:
        tenant: The tenant.
        request_id: Its id.
        execution: Id of its execution.
        fence: Fence of the writing worker.
        number: Rises with each write of a worker.
        num_bytes: Bytes of the tail before the write, as the last write returned them.
        step: New results, a serialised StepOutput.
        end: The end of the request; None: it runs.
        gives_up: True if other workers may take the request over at once.
    """

    tenant: Tenant
    request_id: str
    execution: bytes
    fence: int
    number: int
    num_bytes: int
    step: bytes = b""
    end: generation_pb2.Finished | link_pb2.LinkStatus | None = None
    gives_up: bool = False


class Journal:
    """The journals of all tenants. Every method raises StatusError UNAVAILABLE if Redis fails or does not answer.

    Args:
        redis: The Redis that holds them.
        owner: Name of this worker.
        ttl: Seconds for which a journal is kept after it was last written to.
        lease: Seconds without a sign of life after which others take a worker's requests over.
        max_bytes: Most bytes of one tenant's journals, unless its limits say otherwise.

    Attributes:
        num_failures: Number of failed Redis operations.
    """

    def __init__(self, redis: Redis, owner: str, *, ttl: float, lease: float, max_bytes: int) -> None:
        self._redis = redis
        self._owner = owner
        self._ttl_ms = str(int(ttl * 1e3))
        self._lease_ms = str(int(lease * 1e3))
        self._max_bytes = max_bytes
        self.num_failures = 0

    async def digest_of(self, tenant: Tenant, request_id: str) -> bytes | None:
        """Return the digest of the request with an id; None if there is none."""
        async with self._reach() as redis:
            digest: bytes | None = await redis.hget(_Keys(tenant, request_id).head, "digest")
        return digest

    async def create(
        self, tenant: Tenant, head: Head, fence: int, time_left: float | None, num_writes: int = 0
    ) -> Written:
        """Create a journal. Returns DONE, TAKEN, OTHER or FULL.

        Args:
            tenant: The tenant.
            head: The request.
            fence: Fence of this worker.
            time_left: Seconds until the deadline; None = none.
            num_writes: Number of this worker's last write to an earlier journal of the request.
        """
        keys = _Keys(tenant, head.request_id)
        fields: dict[str, str | bytes] = {
            "execution": head.submit.execution_id,
            "digest": head.digest,
            "request": head.request.SerializeToString(),
            "submit": head.submit.SerializeToString(),
            "started": head.started.SerializeToString(),
            "session": head.session_version,
            "asked": head.asked,
        }
        flat: list[str | bytes] = [part for pair in fields.items() for part in pair]
        left = "" if time_left is None else str(int(time_left * 1e3))
        what = (self._limit(tenant), self._ttl_ms, self._lease_ms, str(fence), self._owner, left, str(num_writes))
        async with self._reach() as redis:
            outcome = await redis.eval(journal_script.CREATE, 4, *keys.all, keys.prefix, head.request_id, *what, *flat)
        return Written(outcome)

    async def head(self, tenant: Tenant, request_id: str) -> Head | None:
        """Return the head of a journal; None if there is none."""
        names = ("digest", "request", "submit", "started", "session", "asked")
        async with self._reach() as redis:
            *fields, asked = await redis.hmget(_Keys(tenant, request_id).head, names)
        if any(field is None for field in fields):
            return None
        known_digest, request, submit, started, session = fields
        try:
            return Head(
                known_digest,
                generation_pb2.GenerateRequest.FromString(request),
                link_pb2.Submit.FromString(submit),
                generation_pb2.Started.FromString(started),
                session.decode(),
                asked or b"",  # version N-1 has none
            )
        except (DecodeError, UnicodeDecodeError):
            raise _unreadable(request_id) from None

    async def read(self, tenant: Tenant, request_id: str, num_bytes: int = 0, edition: str = "") -> Reading | None:
        """Read a journal, with a piece of its tail from `num_bytes` of `edition` on; None if there is no journal."""
        keys = _Keys(tenant, request_id)
        most, num_whole, is_whole = _PIECE_BYTES, 0, False
        while not (num_whole or is_whole):
            place = (str(num_bytes), edition, str(most))
            async with self._reach() as redis:
                found = await redis.eval(journal_script.READ, 2, keys.head, keys.tail, *place)
            if not found:
                return None
            *facts, known, start, size, piece = found
            is_whole = start + len(piece) >= size
            num_whole = len(piece) if is_whole else whole_steps(piece)
            most *= 2  # a step may be longer than a piece
        execution, fence, lease_left, time_left, finished, error, is_cancelled = facts
        try:
            end: generation_pb2.Finished | link_pb2.LinkStatus | None = None
            if finished:
                end = generation_pb2.Finished.FromString(finished)
            elif error:
                end = link_pb2.LinkStatus.FromString(error)
            steps = link_pb2.StepOutput.FromString(piece[:num_whole])
        except DecodeError:
            raise _unreadable(request_id) from None
        left = float(time_left) / 1e3 if time_left else None
        edition = known.decode()
        return Reading(
            execution, fence, lease_left, left, end, bool(is_cancelled), edition, steps, start + num_whole, is_whole
        )

    async def take(self, tenant: Tenant, request_id: str, execution: bytes, fence: int) -> int:
        """Take over a request whose worker's lease has expired. Returns the new fence; 0: another worker has it.

        Args:
            tenant: The tenant.
            request_id: Its id.
            execution: Id of its execution.
            fence: The fence that was read before.
        """
        async with self._reach() as redis:
            head = _Keys(tenant, request_id).head
            claim = (str(fence), self._owner, self._lease_ms, execution)
            return int(await redis.eval(journal_script.TAKE, 1, head, *claim))

    async def cancel(self, tenant: Tenant, request_id: str) -> bool:
        """Mark a request as cancelled, which its worker finds with its next write. Returns False if there is no
        journal.
        """
        async with self._reach() as redis:
            return bool(await redis.eval(journal_script.CANCEL, 1, _Keys(tenant, request_id).head))

    async def write(self, entries: Sequence[Entry]) -> list[tuple[Written, int]]:
        """Write the entries of several requests in one round trip. Returns each outcome, with the bytes of the tail
        then.
        """
        if not entries:
            return []
        calls = [self._write_call(entry) for entry in entries]
        async with self._reach() as redis:
            pipeline = redis.pipeline(transaction=False)
            for keys, arguments in calls:
                pipeline.evalsha(_WRITE_SHA, 4, *keys, *arguments)
            answers = await pipeline.execute(raise_on_error=False)
            for place, answer in enumerate(answers):
                if isinstance(answer, NoScriptError):  # Redis was restarted
                    keys, arguments = calls[place]
                    answers[place] = await redis.eval(journal_script.WRITE, 4, *keys, *arguments)
                elif isinstance(answer, Exception):
                    raise answer
        return [(Written(code), num_bytes) for code, num_bytes in answers]

    async def forget(self, tenant: Tenant, request_id: str, execution: bytes, fence: int) -> None:
        """Remove a journal if this worker still owns it, which frees the request's id."""
        async with self._reach() as redis:
            keys = _Keys(tenant, request_id)
            await redis.eval(journal_script.FORGET, 4, *keys.all, request_id, str(fence), execution)

    def _write_call(self, entry: Entry) -> tuple[Sequence[str], Sequence[str | bytes]]:
        keys = _Keys(entry.tenant, entry.request_id)
        name, end = "", b""
        if entry.end is not None:
            name = "finished" if isinstance(entry.end, generation_pb2.Finished) else "error"
            end = entry.end.SerializeToString()
        lease = "0" if entry.gives_up else self._lease_ms
        return keys.all, (
            keys.prefix, entry.request_id, self._limit(entry.tenant), self._ttl_ms, lease, str(entry.fence),
            str(entry.num_bytes), entry.step, name, end, entry.execution, str(entry.number),
        )  # fmt: skip

    def _limit(self, tenant: Tenant) -> str:
        return str(tenant.limits.kept_bytes or self._max_bytes)

    @asynccontextmanager
    async def _reach(self) -> AsyncIterator[Any]:
        try:
            with cancellable():
                yield self._redis
        except REDIS_ERRORS as error:
            self.num_failures += 1
            cause = RedisFault.of(error).cause
            raise StatusError.unavailable(f"the store of kept requests {cause}", retry_after=_RETRY_AFTER) from None


def digest(request: generation_pb2.GenerateRequest) -> bytes:
    """Return a digest by which a request is distinguished from others."""
    return hashlib.sha256(request.SerializeToString(deterministic=True)).digest()


def no_request(request_id: str) -> StatusError:
    """Return the error NOT_FOUND for an id under which the tenant has no request."""
    return StatusError(
        grpc.StatusCode.NOT_FOUND,
        f"request_id: no request {request_id!r} is kept: it did not begin with ON_DISCONNECT_KEEP, or its time has "
        "passed",
    )


class _Keys:
    """The Redis keys of one request. In a Redis cluster, the part in braces decides the slot."""

    def __init__(self, tenant: Tenant, request_id: str) -> None:
        self.prefix = f"{KEY_PREFIX}request:{{{tenant.name}}}:"
        self.head = self.prefix + request_id
        self.tail = f"{KEY_PREFIX}request-tail:{{{tenant.name}}}:{request_id}"
        index, sizes = f"{KEY_PREFIX}requests:{{{tenant.name}}}", f"{KEY_PREFIX}request-bytes:{{{tenant.name}}}"
        self.all = (self.head, index, sizes, self.tail)


def _unreadable(request_id: str) -> StatusError:
    return StatusError.unavailable(f"request_id: what is kept of request {request_id!r} cannot be read")
