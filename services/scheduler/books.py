"""What became of the requests."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

import grpc

_OK = grpc.StatusCode.OK.value[0]
_ENDED_BY_CLIENT = (grpc.StatusCode.CANCELLED.value[0], grpc.StatusCode.DEADLINE_EXCEEDED.value[0])

QUEUE_TIME_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)


@dataclass
class Books:
    """Counts since start. With those queued and running: accepted = finished + cancelled + rejected + these."""

    accepted: int = 0
    finished: int = 0
    cancelled: int = 0
    rejected: int = 0
    resubmitted: int = 0
    queue_time_counts: list[int] = field(default_factory=lambda: [0] * (len(QUEUE_TIME_BUCKETS) + 1))
    queue_time_sum: float = 0.0

    @property
    def num_open(self) -> int:
        """Requests that have not ended, wherever they are: while they are moved they neither wait nor run."""
        return self.accepted - self.finished - self.cancelled - self.rejected

    def count_end(self, code: int) -> None:
        """A request ended with this google.rpc.Code."""
        if code == _OK:
            self.finished += 1
        elif code in _ENDED_BY_CLIENT:
            self.cancelled += 1
        else:
            self.rejected += 1

    def observe_queue_time(self, seconds: float) -> None:
        """A request left the admission queue for the first time."""
        self.queue_time_counts[bisect_left(QUEUE_TIME_BUCKETS, seconds)] += 1
        self.queue_time_sum += seconds
