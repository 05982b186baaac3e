"""The engine's counters, as they go to the front."""

from __future__ import annotations

from scalellm.services.common.histogram import Histogram
from scalellm.services.executor.engine.engine import Engine
from scalellm.v1 import executor_pb2


def stats_to_wire(engine: Engine) -> executor_pb2.EngineStats:
    """The counts and gauges that only metrics say."""
    stats, load, histograms = engine.stats(), engine.load(), engine.histograms
    return executor_pb2.EngineStats(
        generated_tokens=stats.generated_tokens,
        computed_tokens=stats.computed_tokens,
        drafts=stats.drafts,
        draft_tokens=stats.draft_tokens,
        accepted_tokens=stats.accepted_tokens,
        failed_steps=stats.failed_steps,
        swapped_out_blocks=stats.swapped_out_blocks,
        swapped_in_blocks=stats.swapped_in_blocks,
        running_sequences=load.running_sequences,
        waiting_sequences=load.waiting_sequences,
        cached_blocks=load.cached_blocks,
        free_host_blocks=load.free_host_blocks,
        total_host_blocks=load.total_host_blocks,
        step_seconds=_histogram(histograms.step_seconds),
        step_tokens=_histogram(histograms.step_tokens),
        step_sequences=_histogram(histograms.step_sequences),
        queue_seconds=_histogram(histograms.queue_seconds),
    )


def _histogram(histogram: Histogram) -> executor_pb2.Histogram:
    return executor_pb2.Histogram(bounds=histogram.bounds, counts=histogram.counts, total=histogram.total)
