"""The executor's metrics: one consistent snapshot of the engine's counts per scrape."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from scalellm.services.common.access import Access
from scalellm.services.common.histogram import SEQUENCE_COUNTS, STEP_SECONDS, TOKEN_COUNTS, WAIT_SECONDS, Histogram
from scalellm.services.common.metrics import filled, histogram_metric
from scalellm.services.executor.engine_supervisor import EngineSupervisor
from scalellm.v1 import executor_pb2

_PREFIX = "scalellm_executor"
_INFO_LABELS = ("model", "architecture", "device", "dtype", "kv_cache_dtype", "quantization", "backend")


class ExecutorCollector(Collector):
    """Turns the engine's latest report into metrics. The names follow vLLM's, with our prefix.

    Args:
        supervisor: Source of the engine's latest report, which is at most half a second old.
        access: Source of the state of the API keys.
        loop_lag: Lag of the front's event loop.
    """

    def __init__(self, supervisor: EngineSupervisor, access: Access, loop_lag: Histogram) -> None:
        self._supervisor = supervisor
        self._access = access
        self._loop_lag = loop_lag

    def collect(self) -> Iterator[Metric]:
        """All metrics, from one report."""
        supervisor = self._supervisor
        info = supervisor.info
        yield from self._gauges(info)
        yield from _counters(info)
        yield from _histograms(info.stats)
        what = GaugeMetricFamily(f"{_PREFIX}_info", "What is loaded; always 1.", labels=_INFO_LABELS)
        if info.model:
            filled(what, [(tuple(getattr(info, label) for label in _INFO_LABELS), 1.0)])
        yield what
        text = "Engine processes that ended on their own, or stood still and were ended."
        crashes = CounterMetricFamily(f"{_PREFIX}_engine_crashes", text, labels=("reason",))
        yield filled(crashes, [((end.value,), count) for end, count in supervisor.engine_ends.items()])
        traffic = supervisor.traffic
        both_ways = ("direction",)
        yield filled(
            CounterMetricFamily(f"{_PREFIX}_link_frames", "Messages on links of schedulers.", labels=both_ways),
            [(("sent",), traffic.frames_sent), (("received",), traffic.frames_received)],
        )
        yield filled(
            CounterMetricFamily(f"{_PREFIX}_link_bytes", "Their bytes.", labels=both_ways),
            [(("sent",), traffic.bytes_sent), (("received",), traffic.bytes_received)],
        )
        lag = self._loop_lag
        yield histogram_metric(
            f"{_PREFIX}_event_loop_lag_seconds",
            "How late the front's event loop ran what was due.",
            lag.bounds,
            lag.counts,
            lag.total,
        )

    def _gauges(self, info: executor_pb2.GetExecutorInfoResponse) -> Iterator[Metric]:
        load, stats = info.load, info.stats
        # Without an engine there is no report, so the total is 0 and the used share must be 0.
        usage = 1 - load.free_blocks / load.total_blocks if load.total_blocks else 0.0
        for name, text, value in (
            ("num_requests_running", "Requests that are running, preempted ones included.", load.running),
            ("num_requests_waiting", "Requests that wait for their first step.", load.waiting),
            ("num_tokens_waiting", "Prompt tokens that wait to be computed.", load.waiting_prefill_tokens),
            ("num_sequences_running", "Samples that run.", stats.running_sequences),
            ("num_sequences_waiting", "Samples that wait, preempted ones included.", stats.waiting_sequences),
            ("kv_cache_usage_perc", "Share of KV cache blocks in use, 0 to 1.", usage),
            ("kv_cache_blocks", "KV cache blocks in all.", load.total_blocks),
            ("kv_cache_free_blocks", "KV cache blocks that are free or can be evicted.", load.free_blocks),
            ("kv_cache_cached_blocks", "Of the free blocks, those that a prompt may still find.", stats.cached_blocks),
            ("host_cache_blocks", "Blocks in host memory for preempted sequences.", stats.total_host_blocks),
            ("host_cache_free_blocks", "Of these, the free ones.", stats.free_host_blocks),
            ("tensor_parallel", "Ranks that compute each token together.", info.tensor_parallel),
            ("missing_nodes", "Other hosts of the executor that are not here.", self._supervisor.num_missing_nodes),
            ("max_num_seqs", "Sequences that can run at once.", info.max_num_seqs),
            ("links", "Links of schedulers that stand.", self._supervisor.num_links),
            ("engine_up", "Whether there is an engine.", self._supervisor.has_engine),
            (
                "engine_stalled",
                "Whether there is work and no step, or no word.",
                not self._supervisor.is_alive,
            ),
            ("keys_unread", "Whether API keys or link token cannot be read.", self._access.is_failing),
            ("draining", "Whether nothing is admitted.", self._supervisor.is_draining),
        ):
            yield GaugeMetricFamily(f"{_PREFIX}_{name}", text, value=float(value))


def _counters(info: executor_pb2.GetExecutorInfoResponse) -> Iterator[Metric]:
    stats = info.stats
    for name, text, count in (
        ("requests_accepted", "Requests that came.", info.accepted),
        ("preemptions", "Times a sequence lost its blocks.", info.preemptions),
        ("swaps", "Preemptions whose blocks were kept in host memory.", info.swaps),
        ("swapped_out_blocks", "Blocks copied to host memory.", stats.swapped_out_blocks),
        ("swapped_in_blocks", "Blocks copied back.", stats.swapped_in_blocks),
        ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", info.prefix_cache_queries),
        ("prefix_cache_hits", "Prompt tokens found in the prefix cache.", info.prefix_cache_hits),
        ("steps", "Steps of the engine.", info.steps),
        ("failed_steps", "Steps that ended in an error.", stats.failed_steps),
        ("generation_tokens", "Tokens sampled and sent.", stats.generated_tokens),
        ("computed_tokens", "Tokens that went through the model.", stats.computed_tokens),
        ("spec_decode_num_drafts", "Rows behind which tokens were guessed.", stats.drafts),
        ("spec_decode_num_draft_tokens", "Tokens guessed and checked.", stats.draft_tokens),
        ("spec_decode_num_accepted_tokens", "Guessed tokens that came.", stats.accepted_tokens),
        ("late_compiles", "Kernels compiled while requests waited; alarm when above 0.", info.late_compiles),
    ):
        yield CounterMetricFamily(f"{_PREFIX}_{name}", text, value=count)
    ended = CounterMetricFamily(f"{_PREFIX}_requests", "Requests that ended.", labels=("outcome",))
    outcomes = (("finished", info.finished), ("cancelled", info.cancelled), ("rejected", info.rejected))
    yield filled(ended, [((outcome,), count) for outcome, count in outcomes])


def _histograms(stats: executor_pb2.EngineStats) -> Iterator[HistogramMetricFamily]:
    for name, text, histogram, bounds in (
        ("step_seconds", "Time of the device per step.", stats.step_seconds, STEP_SECONDS),
        ("step_tokens", "Tokens per step.", stats.step_tokens, TOKEN_COUNTS),
        ("step_sequences", "Sequences per step.", stats.step_sequences, SEQUENCE_COUNTS),
        ("queue_time_seconds", "From a request's arrival to its first step.", stats.queue_seconds, WAIT_SECONDS),
    ):
        # No engine, no report: an empty histogram, so that the series are there from the start.
        counts = histogram.counts or [0] * (len(bounds) + 1)
        yield histogram_metric(f"{_PREFIX}_{name}", text, bounds, counts, histogram.total)
