"""Metrics of each model at the edge, under the names that vLLM has for them, with our prefix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram

from scalellm.v1 import common_pb2

_TTFT_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
    *(160.0, 640.0, 2560.0),
)
_ITL_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0)
_E2E_BUCKETS = (0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 60.0, 120.0)
_TOKEN_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)

_LABEL = "model_name"

_COUNTERS = (
    ("prompt_tokens", "Prompt tokens of requests that finished."),
    ("generation_tokens", "Tokens received for requests that run."),
)
_HISTOGRAMS = (
    ("time_to_first_token_seconds", "From a request's arrival to its first token.", _TTFT_BUCKETS),
    ("inter_token_latency_seconds", "Between messages with tokens of one sample.", _ITL_BUCKETS),
    ("e2e_request_latency_seconds", "From a request's arrival to its end, of those that finished.", _E2E_BUCKETS),
    ("request_time_per_output_token_seconds", "Mean over a request's tokens but the first.", _ITL_BUCKETS),
    ("request_queue_time_seconds", "Waiting for an executor and for its first step.", _TTFT_BUCKETS),
    ("request_prefill_time_seconds", "From first step to first token.", _TTFT_BUCKETS),
    ("request_decode_time_seconds", "From first to last token.", _E2E_BUCKETS),
    ("request_prompt_tokens", "Prompt tokens of a request.", _TOKEN_BUCKETS),
    ("request_generation_tokens", "Tokens of a request's samples.", _TOKEN_BUCKETS),
)

_MAX_NOTES = 1000
"""Buffered observations after which they are counted without waiting for `flush`."""


class ModelMetrics:
    """One model's series.

    Args:
        counters: By name, without the prefix.
        histograms: The same.
        success: Samples that ended well, by how they ended.

    Attributes:
        prompt_tokens: Prompt tokens of requests that finished.
        generation_tokens: Tokens received for running requests.
        ttft: Times to the first tokens.
        success: See above.
    """

    def __init__(
        self,
        counters: Mapping[str, Counter],
        histograms: Mapping[str, Histogram],
        success: Mapping[common_pb2.FinishReason, Counter],
    ) -> None:
        self.prompt_tokens, self.generation_tokens = counters["prompt_tokens"], counters["generation_tokens"]
        self.success = success
        self.ttft = histograms["time_to_first_token_seconds"]
        self._itl = histograms["inter_token_latency_seconds"]
        self._e2e = histograms["e2e_request_latency_seconds"]
        self._tpot = histograms["request_time_per_output_token_seconds"]
        self._queue = histograms["request_queue_time_seconds"]
        self._prefill = histograms["request_prefill_time_seconds"]
        self._decode = histograms["request_decode_time_seconds"]
        self._prompt_length = histograms["request_prompt_tokens"]
        self._answer_length = histograms["request_generation_tokens"]
        self._gaps: list[float] = []
        self._notes: list[tuple[Histogram, float]] = []

    @classmethod
    def of_each(cls, registry: CollectorRegistry, model_names: Sequence[str]) -> dict[str, ModelMetrics]:
        """Register the metrics, and return the series of each model. All are there from the start.

        The label `model_name` tells several models apart; the series of a single one have none.
        """
        labels = (_LABEL,) if len(model_names) > 1 else ()
        counters = {
            name: Counter(f"scalellm_{name}", text, labelnames=labels, registry=registry) for name, text in _COUNTERS
        }
        histograms = {
            name: Histogram(f"scalellm_{name}", text, buckets=buckets, labelnames=labels, registry=registry)
            for name, text, buckets in _HISTOGRAMS
        }
        text = "Samples that ended well."
        success = Counter("scalellm_request_success", text, (*labels, "finished_reason"), registry=registry)
        found = {}
        for model in model_names:
            values = (model,) if labels else ()
            found[model] = cls(
                {name: counter.labels(*values) if values else counter for name, counter in counters.items()},
                {name: histogram.labels(*values) if values else histogram for name, histogram in histograms.items()},
                {
                    common_pb2.FINISH_REASON_STOP: success.labels(*values, "stop"),
                    common_pb2.FINISH_REASON_LENGTH: success.labels(*values, "length"),
                },
            )
        return found

    def observe_gap(self, seconds: float) -> None:
        """Record a message with tokens that is sent `seconds` seconds after the sample's previous one."""
        self._gaps.append(seconds)
        if len(self._gaps) >= _MAX_NOTES:
            self.flush()

    def observe_finished(
        self, latency: common_pb2.LatencyBreakdown, usage: common_pb2.Usage, seconds_per_token: float
    ) -> None:
        """Record a finished request; seconds_per_token: 0 if no token followed the first one."""
        self.prompt_tokens.inc(usage.prompt_tokens)
        self._notes += (
            (self._e2e, latency.total_ns / 1e9),
            (self._queue, (latency.admission_ns + latency.queue_ns) / 1e9),
            (self._prefill, latency.prefill_ns / 1e9),
            (self._decode, latency.decode_ns / 1e9),
            (self._prompt_length, usage.prompt_tokens),
            (self._answer_length, usage.completion_tokens),
        )
        if seconds_per_token:
            self._notes.append((self._tpot, seconds_per_token))
        if len(self._notes) >= _MAX_NOTES:
            self.flush()

    def flush(self) -> None:
        """Count the buffered events. All at once they cost a third of what they would cost between messages."""
        gaps, self._gaps = self._gaps, []
        for gap in gaps:
            self._itl.observe(gap)
        notes, self._notes = self._notes, []
        for histogram, value in notes:
            histogram.observe(value)
