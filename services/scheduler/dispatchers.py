"""The dispatchers of one scheduler, one per model, and the choice of the one for an executor or a client link."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator

import grpc

from scalellm.services.common.errors import StatusError
from scalellm.services.scheduler.dispatcher import Dispatcher
from scalellm.services.scheduler.placement import Placement
from scalellm.services.scheduler.replica_link import ReplicaLink
from scalellm.v1 import link_pb2

_log = logging.getLogger(__name__)

_RETRY_AFTER = 1.0


class Dispatchers:
    """One dispatcher for each model that an executor has served since start. Implements ExecutorSet.

    An executor says with its Welcome which model it has; until then the first dispatcher keeps it. One that comes back
    with another model moves to that model's dispatcher.

    Args:
        make: Makes a dispatcher.
    """

    def __init__(self, make: Callable[[], Dispatcher]) -> None:
        self._make = make
        self._all: list[Dispatcher] = []
        self._is_started = False
        self._changed = asyncio.Event()
        self._first = self._add()
        self.is_draining = False

    def __iter__(self) -> Iterator[Dispatcher]:
        """The dispatchers, in the order in which their models came."""
        return iter(self._all)

    def start(self) -> None:
        """Start placement. The grace period for the first executor begins now."""
        self._is_started = True
        self._first.placement.start()

    async def stop(self) -> None:
        """Stop placement and close the links to executors."""
        for dispatcher in self._all:
            dispatcher.placement.stop()
        await asyncio.gather(*(dispatcher.fleet.stop() for dispatcher in self._all))

    # Calls that concern all dispatchers.

    def begin_drain(self) -> None:
        """Refuse new requests."""
        self.is_draining = True
        for dispatcher in self._all:
            dispatcher.intake.begin_drain()

    async def wait_idle(self, limit: float) -> int:
        """Wait until nothing is queued or running, or `limit` seconds have passed. Returns the number of
        requests left.
        """
        return sum(await asyncio.gather(*(dispatcher.placement.wait_idle(limit) for dispatcher in self._all)))

    def end_all(self, error: StatusError, *, moved: bool = False) -> None:
        """End all open requests and client links; moved: clients may send their requests to another scheduler."""
        for dispatcher in self._all:
            dispatcher.intake.end_all(error, moved=moved)

    def turn_away(self, model: str) -> None:
        """Record, for scaling, that a worker refused a request for a model because no scheduler accepted its link.
        An empty name stands for the first model.
        """
        found = self._of_model(model) or self._first
        found.placement.outages.of_all.turn_away()

    @property
    def replicas(self) -> dict[str, ReplicaLink]:
        """All executors that are known, by address."""
        return {address: replica for dispatcher in self._all for address, replica in dispatcher.fleet.replicas.items()}

    @property
    def num_client_links(self) -> int:
        """Number of open client links."""
        return sum(dispatcher.intake.num_links for dispatcher in self._all)

    @property
    def is_ready(self) -> bool:
        """True if some model has an executor that takes requests, and none that has one has stalled."""
        able = [dispatcher for dispatcher in self._all if dispatcher.fleet.ready]
        return bool(able) and all(dispatcher.heartbeat.is_alive for dispatcher in able)

    # ExecutorSet

    def add(self, address: str) -> None:
        """Add the executor at an address. Idempotent."""
        (self._keeper_of(address) or self._first).fleet.add(address)

    def remove(self, address: str) -> None:
        """Remove an executor: it gets no new requests and is forgotten once the running ones have ended."""
        if (keeper := self._keeper_of(address)) is not None:
            keeper.fleet.remove(address)

    def drop_when_down(self, address: str) -> None:
        """Forget an executor once its link is down, since its name no longer resolves to its address."""
        if (keeper := self._keeper_of(address)) is not None:
            keeper.fleet.drop_when_down(address)

    # Choice of the dispatcher of a client's link.

    async def find(self, hello: link_pb2.Hello, patience: float) -> Dispatcher:
        """Return the dispatcher of a new client link, after its model has an executor or the wait for one has ended.

        Args:
            hello: The client's Hello. If it names no model, the served model with the client's tokenizer is chosen.
            patience: Seconds to wait for a first executor of the model.

        Raises:
            StatusError: UNAVAILABLE if no executor of the named model is known; FAILED_PRECONDITION if the client has
                to name one of several models.
        """
        try:
            async with asyncio.timeout(patience):
                while (found := self._find(hello)) is None:
                    self._changed.clear()
                    await self._changed.wait()
                await found.placement.outages.of_all.wait_decided(patience)
        except TimeoutError:
            pass
        found = self._find(hello)  # again, because a model may have been added during the wait
        if found is None:
            message = f"model: no executor of {hello.model!r} is known here, {self._name_models()}"
            raise StatusError.unavailable(message, _RETRY_AFTER)
        return found

    def _find(self, hello: link_pb2.Hello) -> Dispatcher | None:
        if hello.model:
            named = self._of_model(hello.model)
            return named if named is not None and named.fleet.replicas else None
        awaited = [each for each in self._all if each.is_awaited]
        if len(awaited) > 1 and hello.tokenizer_sha256:
            alike = [each for each in awaited if _has_tokenizer(each, hello.tokenizer_sha256)]
            awaited = alike or awaited[:1]  # the first one then refuses the link, because the tokenizers differ
        if len(awaited) > 1:
            message = f"model: must be named, {self._name_models()}; start the tokenizer service with all of them"
            raise StatusError(grpc.StatusCode.FAILED_PRECONDITION, message, field="model")
        return awaited[0] if awaited else self._first

    def _name_models(self) -> str:
        names = ", ".join(repr(each.model) for each in self._all if each.model and each.fleet.replicas)
        return f"there are executors of {names}" if names else "nor of any other model"

    def _of_model(self, model: str) -> Dispatcher | None:
        """Return the dispatcher of a model; None: no executor had it since start, or the name is empty."""
        return next((each for each in self._all if model and each.model == model), None)

    # Choice of the dispatcher of an executor.

    def _keeper_of(self, address: str) -> Dispatcher | None:
        return next((each for each in self._all if address in each.fleet.replicas), None)

    def _home_of(self, replica: ReplicaLink, welcome: link_pb2.Welcome) -> Placement:
        """Move an executor that has sent its Welcome to the dispatcher of its model. Returns that one's placement."""
        here = self._keeper_of(replica.address)
        assert here is not None, f"{replica.address} has been let go"
        there = self._of_model(welcome.model)
        if there is None:
            # The only executor of a model keeps its dispatcher: the new model replaces the old one.
            there = here if not here.model or len(here.fleet.replicas) == 1 else self._add()
        if there is not here:
            _log.info("executor %s has model %s", replica.address, welcome.model)
            here.give_away(replica)
            there.fleet.take_in(replica)
            self._review()
        return there.placement

    def _add(self) -> Dispatcher:
        dispatcher = self._make()
        dispatcher.fleet.home_of = self._home_of
        dispatcher.placement.on_executors_changed = self._review
        if self._is_started:
            dispatcher.placement.start()
        self._all.append(dispatcher)
        return dispatcher

    def _review(self) -> None:
        """Wake waiting links after executors of a model appeared or were lost, and end the unnamed links of lost
        models.
        """
        self._changed.set()
        awaited = [each for each in self._all if each.is_awaited]
        for dispatcher in self._all:
            if awaited and dispatcher.model and not dispatcher.is_awaited:
                dispatcher.intake.end_unnamed()


def _has_tokenizer(dispatcher: Dispatcher, sha256: bytes) -> bool:
    identity = dispatcher.fleet.identity
    return identity is not None and identity.tokenizer_sha256 == sha256
