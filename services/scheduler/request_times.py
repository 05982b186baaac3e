"""Times of a request, for the latency breakdown."""

from __future__ import annotations

from scalellm.v1 import link_pb2


class RequestTimes:
    """Divides the life of a request without gaps into three parts, in monotonic seconds: admission (in the queue, or on
    the way to executors that refused it), failover (on executors that were lost, and until it ran again), and the time
    on its last executor.

    Args:
        now: Time of arrival.
    """

    __slots__ = ("_failover", "_since", "_was_lost", "accepted_at", "admission_seconds")

    def __init__(self, now: float) -> None:
        self.accepted_at = now
        self.admission_seconds = 0.0
        """Time in the admission queue so far."""
        self._failover = 0.0
        self._since = now
        self._was_lost = False

    @property
    def waits_since(self) -> float:
        """Monotonic seconds since which a queued request waits. For one that came back it is the time of its
        dispatch.
        """
        return self._since

    def leave_queue(self, now: float) -> None:
        """Add the waiting time until now to admission, or to failover after a loss."""
        if self._was_lost:
            self._failover += now - self._since
        else:
            self.admission_seconds += now - self._since
        self._since = now

    def come_back(self, *, lost: bool) -> None:
        """Record that the request is queued again. The time since its dispatch counts as failover with `lost`, else as
        admission.
        """
        self._was_lost = lost

    def fill(self, timings: link_pb2.HopTimings, now: float) -> None:
        """Write the scheduler's part of the latency breakdown of a request that ended."""
        timings.scheduler_total_ns = int((now - self.accepted_at) * 1e9)
        timings.admission_ns = int(self.admission_seconds * 1e9)
        timings.failover_ns = int(self._failover * 1e9)
