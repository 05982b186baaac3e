"""Times of a request, for the latency breakdown."""

from __future__ import annotations

from scalellm.v1 import link_pb2


class RequestTimes:
    """Monotonic seconds. The life of a request is divided without gaps into admission (waiting, or under way to
    executors that refused it), failover (on executors that it had to leave, and until it ran again) and its last one.

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
        """Since when a queued request waits; one that came back, since it was sent to where it came back from."""
        return self._since

    def leave_queue(self, now: float) -> None:
        """Count the time that the request waited until now."""
        if self._was_lost:
            self._failover += now - self._since
        else:
            self.admission_seconds += now - self._since
        self._since = now

    def come_back(self, *, lost: bool) -> None:
        """The request waits again. The time since it last left the queue counts as failover or admission, too."""
        self._was_lost = lost

    def fill(self, timings: link_pb2.HopTimings, now: float) -> None:
        """Write the scheduler's part of a request that ended."""
        timings.scheduler_total_ns = int((now - self.accepted_at) * 1e9)
        timings.admission_ns = int(self.admission_seconds * 1e9)
        timings.failover_ns = int(self._failover * 1e9)
