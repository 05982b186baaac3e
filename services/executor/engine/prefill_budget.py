"""The number of prefill tokens that a step may carry beside running decodes."""

_EWMA_WEIGHT = 0.2


class PrefillBudget:
    """Sizes prefill chunks so that a step with decodes takes about `target_itl` seconds (chunked prefill, Sarathi).

    The cost model is one line, `step = decode + per_token * prefill tokens`, both terms measured as moving averages;
    steps without decodes are not limited, as nobody waits for their tokens.
    """

    def __init__(self, target_itl: float | None, min_chunk: int) -> None:
        self._target = target_itl
        self._min_chunk = min_chunk
        self._decode_step: float | None = None
        self._per_token: float | None = None

    @property
    def seconds_per_token(self) -> float | None:
        """Seconds per prefill token; None before the first prefill."""
        return self._per_token

    def limit(self, num_decodes: int, budget: int) -> int:
        """Return how many prefill tokens, at most `budget`, to compute in a step with `num_decodes` decodes."""
        if self._target is None or num_decodes == 0:
            return budget
        chunk = self._min_chunk
        if self._per_token is not None:
            room = self._target - (self._decode_step or 0.0)
            # At least the minimum, so that prefill does not starve if decodes alone miss the target.
            chunk = max(chunk, int(room / max(self._per_token, 1e-9)))
        return min(budget, chunk)

    def observe(self, num_decodes: int, num_prefill_tokens: int, seconds: float) -> None:
        """Update the moving averages with a finished step."""
        if num_prefill_tokens == 0:
            self._decode_step = _average(self._decode_step, seconds)
            return
        if num_decodes and self._decode_step is not None:
            # Decodes alone take no longer than a step with prefill. Without this bound, one slow decode would keep its
            # effect while every step has prefill.
            self._decode_step = min(self._decode_step, seconds)
        decode = (self._decode_step or 0.0) if num_decodes else 0.0
        # Weight small chunks less: decode noise would otherwise be attributed to a few prefill tokens.
        weight = min(1.0, num_prefill_tokens / self._min_chunk)
        self._per_token = _average(self._per_token, max(seconds - decode, 0.0) / num_prefill_tokens, weight)


def _average(old: float | None, new: float, weight: float = 1.0) -> float:
    return new if old is None else old + _EWMA_WEIGHT * weight * (new - old)
