"""The measured rate at which the admission queue drains."""

from __future__ import annotations


class DrainRate:
    """Measures the prompt tokens per second that leave the queue while it waits for executors' credits.

    Only time during which requests wait for credits counts, because the throughput of an idle system shows the demand
    and not the capacity. Tokens and seconds are averaged with the same exponential decay.

    Args:
        half_life: Seconds of waiting after which an observation counts half.
        min_requests: Requests that must have left a held-back queue before there is a rate.
    """

    def __init__(self, half_life: float = 10.0, min_requests: int = 4) -> None:
        self._half_life = half_life
        self._min_requests = min_requests
        self.reset()

    def reset(self) -> None:
        """Discard the measurement, after the set of executors changed."""
        self._held_back_since: float | None = None
        self._seconds = 0.0
        self._tokens = 0.0
        self._num_requests = 0

    def update(self, now: float, num_requests: int, num_tokens: int, held_back: bool) -> None:
        """Record one pass over the queue.

        Args:
            now: Monotonic seconds.
            num_requests: Requests that left the queue in this pass.
            num_tokens: Their prompt tokens.
            held_back: True if other requests stayed because no executor had credits.
        """
        if self._held_back_since is not None:
            elapsed = now - self._held_back_since
            decay = 0.5 ** (elapsed / self._half_life)
            self._seconds = self._seconds * decay + elapsed
            self._tokens = self._tokens * decay + num_tokens
            self._num_requests += num_requests
        self._held_back_since = now if held_back else None

    @property
    def tokens_per_second(self) -> float | None:
        """The measured rate; None until enough requests have left a held-back queue."""
        if self._num_requests < self._min_requests or self._seconds <= 0.0 or self._tokens <= 0.0:
            return None
        return self._tokens / self._seconds
