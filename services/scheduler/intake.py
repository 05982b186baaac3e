"""The clients' side of the scheduler: client links, Submits, Aborts, and the drain."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterable
from typing import TYPE_CHECKING

import grpc

from scalellm.services.common.errors import StatusError
from scalellm.services.scheduler.client_link import ClientLink
from scalellm.services.scheduler.placement import Placement
from scalellm.services.scheduler.request import Request
from scalellm.services.scheduler.request_trace import RequestTrace
from scalellm.v1 import link_pb2

if TYPE_CHECKING:
    from scalellm.services.common.tracing.tracer import Tracer

_RETRY_AFTER = 1.0
_EARLIER = 2**62


class Intake:
    """Checks clients' requests, hands them to placement, and ends them when their link closes.

    Args:
        placement: Dispatches requests to executors and ends them.
        tracer: Makes spans; None = traces are off.
    """

    def __init__(self, placement: Placement, tracer: Tracer | None = None) -> None:
        self.is_draining = False
        self._placement = placement
        self._tracer = tracer
        self._loop = asyncio.get_running_loop()
        self._links: set[ClientLink] = set()
        self._random = random.SystemRandom()
        self._arrivals = 0
        placement.on_new_model = self._on_new_model

    @property
    def num_links(self) -> int:
        """Number of open client links."""
        return len(self._links)

    @property
    def links(self) -> Iterable[ClientLink]:
        """The open client links."""
        return self._links

    def open_link(self, link: ClientLink) -> None:
        """Register a client link that was opened."""
        self._links.add(link)

    def close_link(self, link: ClientLink) -> None:
        """Forget a closed client link and cancel its requests."""
        self._links.discard(link)
        for request in tuple(link.requests.values()):
            self._placement.abandon(request, StatusError(grpc.StatusCode.CANCELLED, "the client's link closed"))

    def submit(self, link: ClientLink, submit: link_pb2.Submit) -> None:
        """Accept a request, or end it at once with its error. Raises StatusError INVALID_ARGUMENT, which ends the link,
        if the handle is in use.
        """
        if submit.handle in link.requests:
            raise StatusError.invalid("handle", f"{submit.handle} is still in use by another request of this link")
        now = self._loop.time()
        self._arrivals += 1
        # Requests that another scheduler has admitted before go ahead of the same tenant's new ones.
        arrival = self._arrivals - _EARLIER if submit.attempt else self._arrivals
        request = Request(link, submit, arrival, now)
        link.requests[submit.handle] = request
        placement = self._placement
        placement.count_in(request)
        try:
            request.check()
            if self._tracer is not None:
                request.trace = RequestTrace.begin(self._tracer, submit)
            if self.is_draining:
                error = StatusError.unavailable("the scheduler is draining", retry_after=_RETRY_AFTER)
                placement.end(request, request.make_finish(error, moved=True))
                return
            if request.client.progress.all_ended:  # its former scheduler was lost before it sent the Finish
                placement.end(request, request.make_finish(None))
                return
            if not submit.sampling.HasField("seed"):
                # The seed is drawn here and not on the executor, so that another executor repeats the answer.
                submit.sampling.seed = self._random.getrandbits(64)
            placement.enter(request, now)
        except StatusError as error:
            placement.end(request, request.make_finish(error))

    def abort(self, link: ClientLink, abort: link_pb2.Abort) -> None:
        """End a request, or one sample of it, because the client wants to. Unknown handles are ignored."""
        request = link.requests.get(abort.handle)
        if request is not None:
            self._placement.abort(request, abort)

    def begin_drain(self) -> None:
        """Refuse new requests, and announce that to the clients."""
        if not self.is_draining:
            self.is_draining = True
            for link in self._links:
                link.announce_draining()

    def end_all(self, error: StatusError, *, moved: bool = False) -> None:
        """End all open requests and client links; moved: clients may send their requests to another scheduler."""
        for link in tuple(self._links):
            self._end_link(link, error, moved=moved)

    def end_unnamed(self) -> None:
        """End the links of clients that named no model, because another model has replaced this one."""
        for link in [link for link in self._links if link.takes_any_model]:
            self._end_link(link, _replaced())

    def _end_link(self, link: ClientLink, error: StatusError, *, moved: bool = False) -> None:
        for request in tuple(link.requests.values()):
            self._placement.abandon(request, error, moved=moved)
        link.close()

    def _on_new_model(self) -> None:
        """End all client links after a change of the model, whose vocabulary makes the clients' token ids
        meaningless.
        """
        self.end_all(_replaced())


def _replaced() -> StatusError:
    return StatusError.unavailable("the executors run another model now")
