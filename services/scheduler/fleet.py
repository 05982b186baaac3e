"""The executors of a model: which are known, and which are ready."""

from __future__ import annotations

import asyncio
import logging
from itertools import islice
from typing import TYPE_CHECKING

import grpc

from scalellm.services.common.errors import StatusError
from scalellm.services.common.link import API_MINOR, PLAINTEXT, LinkDialer, ModelIdentity
from scalellm.services.scheduler.client_link import client_load
from scalellm.services.scheduler.pools import PoolPolicy, Pools
from scalellm.services.scheduler.prefix_index import PrefixIndex
from scalellm.services.scheduler.replica_link import HomeOf, ReplicaLink
from scalellm.services.scheduler.request import Request
from scalellm.services.scheduler.router import Router, Verdict
from scalellm.v1 import link_pb2, scheduler_pb2

if TYPE_CHECKING:
    from scalellm.services.scheduler.placement import Placement

_log = logging.getLogger(__name__)

_RETRY_AFTER = 5.0

_MAX_COUNT = 2**32 - 1
"""The largest value of a uint32 field."""

_MOST_REASONS = 8
"""Most executors that a refusal lists with the reason why they take no requests."""


class Fleet:
    """The replicas by address. The first one that is ready defines the model; one whose tokenizer or vocabulary differs
    is refused.

    The cost of a change to one executor does not depend on the number of the others.

    Args:
        instance_id: Instance id of this scheduler.
        silence_limit: Seconds of silence after which an executor with work counts as dead.
        dialer: Dialer of the connections.
        pool_policy: See Pools.

    Attributes:
        replicas: All that are known, by address.
        ready: Those that take new requests, by address.
        router: Chooses among these.
        pools: The pools among executors with different numbers of devices.
        identity: The model; None until the first executor is ready.
        home_of: See HomeOf; None: this fleet keeps all its executors.
    """

    def __init__(
        self,
        instance_id: str,
        silence_limit: float,
        dialer: LinkDialer = PLAINTEXT,
        pool_policy: PoolPolicy = "measured",
    ) -> None:
        self.replicas: dict[str, ReplicaLink] = {}
        self.ready: dict[str, ReplicaLink] = {}
        self.router = Router(PrefixIndex())
        self.pools = Pools(pool_policy)
        self.identity: ModelIdentity | None = None
        self.home_of: HomeOf | None = None
        self._hello = link_pb2.Hello(client_id=instance_id, api_minor=API_MINOR)
        self._told_demand: tuple[int, ...] = (0, 0, 0)
        self._silence_limit = silence_limit
        self._dialer = dialer
        self._closing: set[asyncio.Task[None]] = set()
        self._reachable: set[str] = set()  # addresses
        self._instances: dict[str, str] = {}  # of the links that are up, by address
        self._addresses: dict[str, str] = {}  # the reverse
        self._placement: Placement

    def start(self, placement: Placement) -> None:
        """Let executors join; `placement` handles the events on their links."""
        self._placement = placement

    async def stop(self) -> None:
        """Close all links."""
        await asyncio.gather(*(replica.stop() for replica in self.replicas.values()), *self._closing)

    @property
    def num_running(self) -> int:
        """Number of requests that run on executors."""
        return sum(len(replica.running) for replica in self.replicas.values())

    @property
    def is_reachable(self) -> bool:
        """True if some executor answers and is expected to take requests soon."""
        return bool(self._reachable)

    @property
    def may_take_grammars(self) -> bool:
        """True if some executor answers and may take requests with grammars soon: all that answer, except those that
        are ready and take none.
        """
        return len(self._reachable) > self.router.num_without_grammars

    def make_welcome(self, instance_id: str) -> link_pb2.Welcome:
        """Make the Welcome of a client link, with the limits that every ready executor supports. Raises StatusError
        UNAVAILABLE if none is ready.
        """
        if self.identity is None or not self.ready:
            raise self.describe_absence()
        welcomes = [replica.welcome for replica in self.ready.values() if replica.welcome is not None]
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
            grammars=True,  # the router sends grammars only to executors that take them
        )

    def route(self, request: Request, *, num_requests: int, now: float, may_wait: bool) -> ReplicaLink | Verdict:
        """Choose the executor of a request.

        Args:
            request: The request to run.
            num_requests: Number of queued and running requests, this one included.
            now: Monotonic seconds.
            may_wait: True if it may still wait for its session's executor.
        """
        executor, sampling = request.executor, request.submit.sampling
        self.pools.lengths.expect(
            request.num_prompt_tokens, sampling.max_tokens if sampling.HasField("max_tokens") else 0
        )
        return self.router.route(
            num_prompt_tokens=request.num_prompt_tokens,
            max_len=request.max_len,
            hashes=executor.hashes,
            needs_grammars=request.needs_grammars,
            session_address=executor.session_address,
            may_wait=may_wait,
            refused_by=executor.refused_by,
            pool=self.pools.choose(num_requests, now),
        )

    def describe_absence(self) -> StatusError:
        """Return the error that says why no request can run."""
        model = f" for model {self.identity.model!r}" if self.identity is not None else ""
        message = f"no executor is available{model} ({self._list_reasons()})"
        return StatusError.unavailable(message, retry_after=_RETRY_AFTER)

    def describe_absence_of_grammars(self) -> StatusError:
        """Return the error that says why no request with a grammar can run: UNIMPLEMENTED if all executors are ready
        and take none, UNAVAILABLE while some are not ready.
        """
        if 0 < len(self.ready) == len(self.replicas):
            message = (
                "structured_output: no executor can keep to one: they have no tokenizer, or are of an older version"
            )
            return StatusError(grpc.StatusCode.UNIMPLEMENTED, message, field="structured_output")
        message = f"structured_output: no executor that can keep to one is available ({self._list_reasons()})"
        return StatusError.unavailable(message, retry_after=_RETRY_AFTER)

    def _list_reasons(self) -> str:
        """Return the reason why each executor takes no request, for the first few of them."""
        some = islice(self.replicas.values(), _MOST_REASONS)
        reasons = "; ".join(f"{replica.address}: {_why(replica)}" for replica in some) or "none is known"
        if (num_others := len(self.replicas) - _MOST_REASONS) > 0:
            reasons += f"; and {num_others} others"
        return reasons

    # ExecutorSet: which executors there are.

    def add(self, address: str) -> None:
        """Connect to the executor at an address. Idempotent; revokes an earlier removal."""
        if address in self.replicas:
            self.replicas[address].stay()
            return
        replica = ReplicaLink(address, self._hello, self._placement, self._silence_limit, self._dialer, self.home_of)
        self.replicas[address] = replica
        replica.start()
        _log.info("executor %s joins", address)

    def remove(self, address: str) -> None:
        """Remove an executor: it gets no new requests and is forgotten once the running ones have ended."""
        self.replicas[address].leave()

    def drop_when_down(self, address: str) -> None:
        """Forget an executor as soon as its link is down."""
        if address in self.replicas:
            self.replicas[address].forget_when_down()

    def give_away(self, replica: ReplicaLink) -> None:
        """Release an executor that is not ready to another fleet."""
        del self.replicas[replica.address]
        self._reachable.discard(replica.address)

    def take_in(self, replica: ReplicaLink) -> None:
        """Adopt an executor from another fleet. The caller switches its link to this fleet's placement."""
        self.replicas[replica.address] = replica

    def announce_demand(self, demand: link_pb2.Renewal) -> None:
        """Send the demand (requests that wait for credits) to all executors, if its order of magnitude has changed
        since it was last sent.
        """
        values = (demand.queued_requests, demand.queued_tokens, demand.queued_tenants)
        magnitudes = tuple(value.bit_length() for value in values)
        if magnitudes != self._told_demand:
            self._told_demand = magnitudes
            for replica in self.replicas.values():
                replica.announce_demand()

    # Handling of executors' events.

    def adopt(self, replica: ReplicaLink, welcome: link_pb2.Welcome) -> bool:
        """Check the model of an executor that has sent its Welcome, and take it over where it is the fleet's only one.

        Returns:
            True if the fleet's model has been replaced.

        Raises:
            StatusError: FAILED_PRECONDITION if the executor cannot serve beside the others.
        """
        identity = ModelIdentity.of(welcome)
        namesake = self._addresses.get(welcome.instance_id, replica.address)
        if namesake != replica.address:
            raise _incompatible(f"{replica.address} is the same executor as {namesake}")
        if identity == self.identity:
            return False
        others = self._instances.keys() - {replica.address}
        if others and self.identity is not None:
            raise _incompatible(
                f"{replica.address} runs {identity.model!r}, the others run {self.identity.model!r}: "
                f"{identity.differences(self.identity)} differ"
            )
        is_new_model = self.identity is not None
        self.identity = identity
        return is_new_model

    def refresh(self, replica: ReplicaLink) -> bool:
        """Update the sets and indexes from a replica's state, and forget a replica that is gone. Returns True if the
        replica began or ceased to be ready.
        """
        address = replica.address
        if self.replicas.get(address) is not replica:  # its link is being closed
            return False
        if (instance_id := self._instances.pop(address, None)) is not None:
            del self._addresses[instance_id]
        if replica.is_up:
            self._instances[address] = replica.instance_id
            self._addresses[replica.instance_id] = address
        if replica.is_reachable:
            self._reachable.add(address)
        else:
            self._reachable.discard(address)
        changed = replica.is_ready != (address in self.ready)
        if changed and replica.is_ready:
            self.ready[address] = replica
            self.router.join(replica)
            self.pools.join(replica)
        elif changed:
            del self.ready[address]
            self.router.leave(replica)
            self.pools.leave(replica)
        if changed:
            state = "is ready" if replica.is_ready else "takes no requests now"
            _log.info("executor %s %s; %d are ready", address, state, len(self.ready))
        if replica.is_gone:
            self._let_go(replica)
        return changed

    def _let_go(self, replica: ReplicaLink) -> None:
        _log.info("executor %s left", replica.address)
        del self.replicas[replica.address]
        self._reachable.discard(replica.address)
        if (instance_id := self._instances.pop(replica.address, None)) is not None:
            del self._addresses[instance_id]
        # Not awaited, because this may run inside the replica's own task, which stop() ends.
        closing = asyncio.create_task(replica.stop())
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)


def _incompatible(message: str) -> StatusError:
    return StatusError(grpc.StatusCode.FAILED_PRECONDITION, message)


def _why(replica: ReplicaLink) -> str:
    if replica.is_ready:
        return "ready, but without grammars"
    if replica.phase == scheduler_pb2.EXECUTOR_PHASE_DRAINING:
        return "leaving"
    return replica.last_error.removeprefix(f"{replica.address}: ") or "connecting"
