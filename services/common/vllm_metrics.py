"""vLLM's names for our metrics, which existing dashboards, autoscalers and gateways read.

The samples of a metric are rendered a second time under the other name, with vLLM's labels, and not counted twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

_NAMES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "scalellm_time_to_first_token_seconds": ("time_to_first_token_seconds",),
        # The second one is the name before vLLM 0.11.
        "scalellm_inter_token_latency_seconds": ("inter_token_latency_seconds", "time_per_output_token_seconds"),
        "scalellm_request_time_per_output_token_seconds": ("request_time_per_output_token_seconds",),
        "scalellm_e2e_request_latency_seconds": ("e2e_request_latency_seconds",),
        "scalellm_request_queue_time_seconds": ("request_queue_time_seconds",),
        "scalellm_request_prefill_time_seconds": ("request_prefill_time_seconds",),
        "scalellm_request_decode_time_seconds": ("request_decode_time_seconds",),
        "scalellm_request_prompt_tokens": ("request_prompt_tokens",),
        "scalellm_request_generation_tokens": ("request_generation_tokens",),
        "scalellm_prompt_tokens": ("prompt_tokens",),
        "scalellm_generation_tokens": ("generation_tokens",),
        "scalellm_request_success": ("request_success",),
        # Requests that wait for an executor wait here, those that wait for a step wait there: they add up.
        "scalellm_scheduler_model_requests_waiting": ("num_requests_waiting",),
        "scalellm_executor_num_requests_waiting": ("num_requests_waiting",),
        "scalellm_executor_num_requests_running": ("num_requests_running",),
        "scalellm_executor_kv_cache_usage_perc": ("kv_cache_usage_perc", "gpu_cache_usage_perc"),
        "scalellm_executor_prefix_cache_queries": ("prefix_cache_queries",),
        "scalellm_executor_prefix_cache_hits": ("prefix_cache_hits",),
        "scalellm_executor_preemptions": ("num_preemptions",),
        "scalellm_executor_step_tokens": ("iteration_tokens_total",),
    }
)


class WithVllmNames(Collector):
    """All metrics of a collector, and some of them again under vLLM's names.

    Args:
        collector: Collector of the metrics.
        engine: Value of the label `engine`.
        model_name: Returns, at each scrape, the value of the label `model_name` for metrics that do not have it.
    """

    def __init__(self, collector: Collector, engine: str, model_name: Callable[[], str] = lambda: "") -> None:
        self._collector = collector
        self._engine = engine
        self._model_name = model_name

    def describe(self) -> list[Metric]:
        """Return nothing, so that registering does not collect."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics under our names, and then those under vLLM's."""
        labels = {"model_name": self._model_name(), "engine": self._engine}
        aliases = []
        for metric in self._collector.collect():
            yield metric
            aliases += [_renamed(metric, f"vllm:{name}", labels) for name in _NAMES.get(metric.name, ())]
        yield from aliases


def _renamed(metric: Metric, name: str, labels: Mapping[str, str]) -> Metric:
    alias = Metric(name, metric.documentation, metric.type)
    alias.samples = [
        sample._replace(name=name + sample.name.removeprefix(metric.name), labels={**labels, **sample.labels})
        for sample in metric.samples
    ]
    return alias
