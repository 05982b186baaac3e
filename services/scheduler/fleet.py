"""All executors: who is ready, what model they run, and what it means when none is left."""

from __future__ import annotations

import asyncio
import logging
from typing import NamedTuple, Protocol

import grpc

from scalellm.v1 import link_pb2, scheduler_pb2
from services.common.errors import StatusError
from services.common.link import API_MINOR, PLAINTEXT, LinkDialer
from services.scheduler.client_link import client_load
from services.scheduler.replica_link import ReplicaLink
from services.scheduler.request import Request

_log = logging.getLogger(__name__)

_MAX_COUNT = 2**32 - 1
"""Of a uint32 field."""


class FleetListener(Protocol):
    """Who is told what happens to the executors."""

    def fleet_changed(self) -> None:
        """Other executors are ready than before."""

    def fleet_out(self, error: StatusError) -> None:
        """No executor has been ready for the whole grace period."""

    def model_changed(self) -> None:
        """All executors went away and others came that run another model."""

    def replica_stepped(self, replica: ReplicaLink, step: link_pb2.StepOutput) -> None:
        """An executor sent a frame."""

    def requests_lost(self, requests: list[Request], replica: ReplicaLink, error: StatusError, planned: bool) -> None:
        """The link broke under these requests; planned: the executor had said that it was leaving."""


class Identity(NamedTuple):
    """What all executors must have in common for requests to move between them."""

    model: str
    tokenizer_sha256: bytes
    vocab_size: int


class Fleet:
    """The replicas by address. The first one that is ready defines the model; others with another one are refused.

    Args:
        instance_id: Of this scheduler.
        grace: Seconds without a ready executor that are ridden out: requests wait, in case one comes (back).
        silence_limit: Seconds of silence after which an executor with work counts as dead.
        dialer: How to connect to them.
    """

    def __init__(self, instance_id: str, grace: float, silence_limit: float, dialer: LinkDialer = PLAINTEXT) -> None:
        self.replicas: dict[str, ReplicaLink] = {}
        self.ready: list[ReplicaLink] = []
        self.identity: Identity | None = None
        self.outage: StatusError | None = None
        self._hello = link_pb2.Hello(client_id=instance_id, api_minor=API_MINOR)
        self._grace = grace
        self._silence_limit = silence_limit
        self._dialer = dialer
        self._grace_timer: asyncio.TimerHandle | None = None
        self._is_ready = asyncio.Event()
        self._closing: set[asyncio.Task[None]] = set()
        self._listener: FleetListener

    def start(self, listener: FleetListener) -> None:
        """Begin; the grace period runs from here."""
        self._listener = listener
        self._update()

    async def stop(self) -> None:
        """Close all links."""
        if self._grace_timer is not None:
            self._grace_timer.cancel()
        await asyncio.gather(*(replica.stop() for replica in self.replicas.values()), *self._closing)

    async def wait_ready(self) -> bool:
        """Wait for a ready executor, no longer than the grace period. Whether there is one."""
        try:
            async with asyncio.timeout(self._grace):
                await self._is_ready.wait()
        except TimeoutError:
            return False
        return True

    @property
    def num_running(self) -> int:
        """Requests that run on executors."""
        return sum(len(replica.running) for replica in self.replicas.values())

    def make_welcome(self, instance_id: str) -> link_pb2.Welcome:
        """What a client link is told: what every ready executor can keep."""
        if self.identity is None or not self.ready:
            raise self.make_outage()
        welcomes = [replica.welcome for replica in self.ready if replica.welcome is not None]
        return link_pb2.Welcome(
            instance_id=instance_id,
            api_minor=API_MINOR,
            model=self.identity.model,
            tokenizer_sha256=self.identity.tokenizer_sha256,
            vocab_size=self.identity.vocab_size,
            block_size=welcomes[0].block_size,
            num_blocks=min(sum(welcome.num_blocks for welcome in welcomes), _MAX_COUNT),
            max_model_len=min(welcome.max_model_len for welcome in welcomes),
            max_num_seqs=min(sum(welcome.max_num_seqs for welcome in welcomes), _MAX_COUNT),
            load=client_load(draining=False),
        )

    def make_outage(self) -> StatusError:
        """Why no request can run."""
        reasons = [f"{replica.address}: {_why(replica)}" for replica in self.replicas.values()]
        return StatusError.unavailable(
            f"no executor is available ({'; '.join(reasons) or 'none is known'})", retry_after=max(self._grace, 1.0)
        )

    # ExecutorSet: which executors there are.

    def add(self, address: str) -> None:
        """An executor is there. Idempotent; takes back a removal."""
        replica = self.replicas.get(address)
        if replica is None:
            replica = self.replicas[address] = ReplicaLink(
                address, self._hello, self, self._silence_limit, self._dialer
            )
            replica.start()
            _log.info("executor %s joins", address)
        replica.is_leaving = replica.drop_when_down = False
        self._update()

    def remove(self, address: str) -> None:
        """An executor leaves: no new requests, gone once the running ones are done."""
        replica = self.replicas[address]
        replica.is_leaving = True
        self.replica_changed(replica)

    def drop_when_down(self, address: str) -> None:
        """An executor is forgotten as soon as its link is down."""
        replica = self.replicas.get(address)
        if replica is not None:
            replica.drop_when_down = True
            if not replica.is_up:
                self._discard(replica)

    # ReplicaEvents: what happens on their links.

    def check_welcome(self, replica: ReplicaLink, welcome: link_pb2.Welcome) -> None:
        """Refuse an executor that cannot serve beside the others."""
        identity = Identity(welcome.model, welcome.tokenizer_sha256, welcome.vocab_size)
        others = [other for other in self.replicas.values() if other is not replica and other.is_up]
        for other in others:
            if other.instance_id == welcome.instance_id:
                raise _incompatible(f"{replica.address} is the same executor as {other.address}")
        if identity == self.identity:
            return
        if others and self.identity is not None:
            what = [name for name, a, b in zip(Identity._fields, identity, self.identity, strict=True) if a != b]
            raise _incompatible(
                f"{replica.address} runs {identity.model!r}, the others run {self.identity.model!r}: "
                f"{' and '.join(what)} differ"
            )
        is_new_model = self.identity is not None
        self.identity = identity
        if is_new_model:
            self._listener.model_changed()

    def replica_changed(self, replica: ReplicaLink) -> None:
        """Take over a change of phase; let go of a replica that is leaving and idle."""
        if replica.is_leaving and not replica.running:
            self._discard(replica)
        self._update()

    def replica_stepped(self, replica: ReplicaLink, step: link_pb2.StepOutput) -> None:
        """An executor sent a frame."""
        self._listener.replica_stepped(replica, step)

    def replica_lost(self, replica: ReplicaLink, requests: list[Request], error: StatusError) -> None:
        """A link broke, or could not be made."""
        planned = replica.is_leaving or replica.load.draining
        if replica.is_leaving or replica.drop_when_down:
            self._discard(replica)
        self._update()
        if requests:
            self._listener.requests_lost(requests, replica, error, planned)

    def _discard(self, replica: ReplicaLink) -> None:
        if self.replicas.get(replica.address) is replica:
            _log.info("executor %s left", replica.address)
            del self.replicas[replica.address]
            # Not awaited: this may run inside the very task that is to be stopped.
            closing = asyncio.create_task(replica.stop())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    def _update(self) -> None:
        ready = [replica for replica in self.replicas.values() if replica.is_ready]
        changed = ready != self.ready
        self.ready = ready
        if ready:
            self.outage = None
            self._is_ready.set()
            if self._grace_timer is not None:
                self._grace_timer.cancel()
                self._grace_timer = None
        else:
            self._is_ready.clear()
            if self._grace_timer is None and self.outage is None:
                self._grace_timer = asyncio.get_running_loop().call_later(self._grace, self._give_up)
        if changed:
            _log.info("ready executors: %s", ", ".join(replica.address for replica in ready) or "none")
            self._listener.fleet_changed()

    def _give_up(self) -> None:
        self._grace_timer = None
        self.outage = self.make_outage()
        level = logging.INFO if self.identity is None else logging.ERROR  # whoever waits for a first one is starting
        _log.log(level, "requests end with UNAVAILABLE: %s", self.outage.message)
        self._listener.fleet_out(self.outage)


def _incompatible(message: str) -> StatusError:
    return StatusError(grpc.StatusCode.FAILED_PRECONDITION, message)


def _why(replica: ReplicaLink) -> str:
    if replica.phase == scheduler_pb2.EXECUTOR_PHASE_DRAINING:
        return "leaving"
    return replica.last_error.removeprefix(f"{replica.address}: ") or "connecting"
