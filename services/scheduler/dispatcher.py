"""The dispatcher of one model's requests: its executors, queue, counts and client links."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from scalellm.services.common.health import Heartbeat
from scalellm.services.common.link import PLAINTEXT, LinkDialer
from scalellm.services.scheduler.affinity_store import AffinityStore
from scalellm.services.scheduler.config import SchedulerSettings
from scalellm.services.scheduler.fleet import Fleet
from scalellm.services.scheduler.intake import Intake
from scalellm.services.scheduler.placement import Placement
from scalellm.services.scheduler.replica_link import ReplicaLink
from scalellm.v1 import scheduler_pb2

if TYPE_CHECKING:
    from scalellm.services.common.tracing.tracer import Tracer


class Dispatcher:
    """One model's part of a scheduler. An executor serves one model, so two dispatchers share nothing.

    Args:
        settings: Settings of the scheduler; the limits of the queue hold for each model.
        instance_id: Instance id of the scheduler.
        affinity: The last executor of each session.
        tracer: Makes spans; None = traces are off.
        dialer: Dialer of the executors.
        clock: Monotonic seconds.

    Attributes:
        fleet: The executors.
        placement: Dispatches requests to executors and ends them.
        intake: Accepts requests from client links.
        heartbeat: Records progress, for the health check.
    """

    def __init__(
        self,
        settings: SchedulerSettings,
        instance_id: str,
        affinity: AffinityStore,
        tracer: Tracer | None = None,
        dialer: LinkDialer = PLAINTEXT,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.fleet = Fleet(instance_id, settings.stall_limit_s, dialer, settings.pool_policy)
        self.heartbeat = Heartbeat(settings.stall_limit_s, clock)
        self.placement = Placement(settings, self.fleet, affinity, self.heartbeat)
        self.intake = Intake(self.placement, tracer)

    @property
    def model(self) -> str:
        """Name of the model. Empty until the first executor was ready."""
        return self.fleet.identity.model if self.fleet.identity is not None else ""

    @property
    def is_awaited(self) -> bool:
        """True while requests may wait for the model: it has executors that are ready or expected to become ready."""
        return bool(self.model and self.fleet.replicas) and not self.placement.outages.of_all.is_given_up

    def give_away(self, replica: ReplicaLink) -> None:
        """Release an executor that is not ready to the dispatcher of another model."""
        self.fleet.give_away(replica)
        self.placement.outages.update()

    def describe(self) -> scheduler_pb2.ModelState:
        """Return the model's counts for GetState."""
        books, queue = self.placement.books, self.placement.queue
        return scheduler_pb2.ModelState(
            model=self.model,
            queued=len(queue),
            queued_tokens=queue.num_tokens,
            running=self.fleet.num_running,
            accepted=books.accepted,
            finished=books.finished,
            cancelled=books.cancelled,
            rejected=books.rejected,
            ready_executors=len(self.fleet.ready),
        )
