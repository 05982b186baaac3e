"""The executor's metrics: one consistent snapshot of the engine's books per scrape."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from scalellm.v1 import executor_pb2


class ExecutorCollector(Collector):
    """Turns the engine's latest report into metrics. The names follow vLLM's, with our prefix.

    Args:
        info: Returns the latest report.
    """

    def __init__(self, info: Callable[[], executor_pb2.GetExecutorInfoResponse]) -> None:
        self._info = info

    def collect(self) -> Iterator[Metric]:
        """All metrics, from one report."""
        info = self._info()
        load = info.load
        # Nothing is in use while there is no engine, which reports no blocks at all.
        usage = 1 - load.free_blocks / load.total_blocks if load.total_blocks else 0.0
        for name, text, value in (
            ("num_requests_running", "Requests that are running, preempted ones included.", load.running),
            ("num_requests_waiting", "Requests that wait for their first step.", load.waiting),
            ("kv_cache_usage_perc", "Share of KV cache blocks in use, 0 to 1.", usage),
            ("kv_cache_blocks", "KV cache blocks in all.", load.total_blocks),
            ("kv_cache_free_blocks", "KV cache blocks that are free or can be evicted.", load.free_blocks),
        ):
            yield GaugeMetricFamily(f"scalellm_executor_{name}", text, value=value)
        for name, text, count in (
            ("requests_accepted", "Requests that came.", info.accepted),
            ("preemptions", "Times a sequence lost its blocks.", info.preemptions),
            ("swaps", "Preemptions whose blocks were kept in host memory.", info.swaps),
            ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", info.prefix_cache_queries),
            ("prefix_cache_hits", "Prompt tokens found in the prefix cache.", info.prefix_cache_hits),
            ("steps", "Steps of the engine.", info.steps),
            ("late_compiles", "Kernels compiled while requests waited; alarm when above 0.", info.late_compiles),
        ):
            yield CounterMetricFamily(f"scalellm_executor_{name}", text, value=count)
        ended = CounterMetricFamily("scalellm_executor_requests", "Requests that ended.", labels=("outcome",))
        for outcome, count in (
            ("finished", info.finished),
            ("cancelled", info.cancelled),
            ("rejected", info.rejected),
        ):
            ended.add_metric((outcome,), count)
        yield ended
