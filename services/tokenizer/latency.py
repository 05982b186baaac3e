"""The latency breakdown of one request: in its last message, and as `server-timing` metadata."""

from __future__ import annotations

import time
from collections.abc import Callable

from scalellm.services.tokenizer.token_receiver import Resubmission, TokenReceiver
from scalellm.v1 import common_pb2, link_pb2

_HOP_PARTS = ("admission_ns", "queue_ns", "prefill_ns", "decode_ns", "failover_ns")
_TIMING_NAMES = (
    ("session_ns", "session"),
    ("tokenize_ns", "tokenize"),
    ("admission_ns", "admission"),
    ("queue_ns", "queue"),
    ("prefill_ns", "prefill"),
    ("decode_ns", "decode"),
    ("failover_ns", "failover"),
    ("detokenize_ns", "detokenize"),
    ("network_ns", "network"),
)


class LatencyTrace:
    """The times of one request at the edge. All are of this process's monotonic clock, in nanoseconds.

    Attributes:
        arrived_at: Time at which the request came.
        session_at: Time at which loading its session began; 0 = it did not.
        session_ns: Spent loading the session.
        tokenize_at: Time at which the work on its prompt began; 0 = it did not.
        tokenize_ns: Spent on the chat template and encoding.
        submitted_at: Time at which the request left for the scheduler; 0 = not yet.
        first_token_at: Time at which its first token came; 0 = not yet.
        last_token_at: Time at which its latest token came; 0 = none yet.
        finished_at: Time at which the scheduler said that it had ended; 0 = not yet.
        detokenize_cpu_ns: Spent on detokenisation so far.
        resubmissions: Time and reason of each time that it was sent to a scheduler again.
    """

    def __init__(self, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self._clock = clock
        self.arrived_at = clock()
        self.session_at = 0
        self.session_ns = 0
        self.tokenize_at = 0
        self.tokenize_ns = 0
        self.submitted_at = 0
        self.first_token_at = 0
        self.last_token_at = 0
        self.finished_at = 0
        self.detokenize_cpu_ns = 0
        self.resubmissions: tuple[Resubmission, ...] = ()

    def now(self) -> int:
        """The clock."""
        return self._clock()

    def leave_below(self, receiver: TokenReceiver) -> None:
        """Copy the times that the request's receiver recorded, once no more results are taken from it."""
        self.first_token_at, self.last_token_at = receiver.first_token_at, receiver.last_token_at
        self.finished_at = receiver.finished_at
        self.resubmissions = receiver.resubmissions

    @property
    def ttft_seconds(self) -> float:
        """Seconds from the arrival to the first token. Valid once that has arrived."""
        return (self.first_token_at - self.arrived_at) / 1e9

    def breakdown(self, timings: link_pb2.HopTimings | None) -> common_pb2.LatencyBreakdown:
        """Return the breakdown as known now. Its parts add up to the total exactly.

        Durations measured by the hops below lie between two times of this clock and are cut to that span, because the
        other clocks may run at another rate. So the remainder, `network_ns`, is never negative.

        Args:
            timings: Timings of the request's Finish; None when it did not get that far.
        """
        now = self._clock()
        result = common_pb2.LatencyBreakdown(
            total_ns=now - self.arrived_at,
            session_ns=self.session_ns,
            tokenize_ns=self.tokenize_ns,
            detokenize_cpu_ns=self.detokenize_cpu_ns,
        )
        below = 0
        if self.submitted_at:
            below = (self.last_token_at or now) - self.submitted_at
        if self.last_token_at:
            result.ttft_ns = self.first_token_at - self.arrived_at
            result.detokenize_ns = now - self.last_token_at
        if timings is not None:
            for name in _HOP_PARTS:
                part = min(getattr(timings, name), below)
                setattr(result, name, part)
                below -= part
            result.preempted_ns = timings.preempted_ns
            result.executor_id = timings.executor_id
        known = sum(getattr(result, name) for name, _ in _TIMING_NAMES)
        result.network_ns = result.total_ns - known
        return result


def server_timing(
    latency: common_pb2.LatencyBreakdown, usage: common_pb2.Usage | None, *, is_complete: bool = True
) -> str:
    """The breakdown as a value of `Server-Timing` (W3C): durations in milliseconds, the rest as descriptions.

    Args:
        latency: The breakdown, as far as it is known.
        usage: The usage, as far as it is known.
        is_complete: False when the hops below did not report: the remainder is then not the network's.
    """
    entries = [
        f"{label};dur={value / 1e6:.3f}"
        for name, label in _TIMING_NAMES
        if (value := getattr(latency, name)) > 0 and (is_complete or name != "network_ns")
    ]
    entries.append(f"total;dur={latency.total_ns / 1e6:.3f}")
    if latency.ttft_ns:
        entries.append(f"ttft;dur={latency.ttft_ns / 1e6:.3f}")
    if latency.executor_id:
        entries.append(f'executor;desc="{_quotable(latency.executor_id)}"')
    if usage is not None:
        entries.append(f"cached;desc={usage.cached_tokens}")
        entries.append(f"preemptions;desc={usage.num_preemptions}")
    return ", ".join(entries)


def _quotable(text: str) -> str:
    # Metadata is ASCII, and a quoted string must not end early.
    return "".join(char if " " <= char <= "~" and char not in '"\\' else "?" for char in text)
