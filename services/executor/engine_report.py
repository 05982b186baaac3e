"""The engine's report to the front: its model, state and counts in one message."""

from __future__ import annotations

from scalellm.services.common.histogram import Histogram
from scalellm.services.executor.engine.engine import Engine
from scalellm.services.executor.engine_load import load_to_wire
from scalellm.v1 import executor_pb2


def make_report(
    engine: Engine,
    info: executor_pb2.GetExecutorInfoResponse,
    *,
    num_refused: int,
    late_compiles: int,
    draining: bool,
) -> executor_pb2.GetExecutorInfoResponse:
    """Return the message with which the front answers GetInfo and from which it makes metrics.

    Args:
        engine: The engine.
        info: The part of the message that describes its model.
        num_refused: Requests that were refused before or by the engine.
        late_compiles: Kernel variants that were compiled after warm-up.
        draining: True if no new requests are taken.
    """
    stats, load, histograms = engine.stats(), engine.load(), engine.histograms
    report = executor_pb2.GetExecutorInfoResponse(
        load=load_to_wire(load, draining),
        steps=stats.steps,
        accepted=stats.accepted + num_refused,
        finished=stats.finished,
        cancelled=stats.cancelled + stats.deadline_exceeded,
        rejected=num_refused + stats.failed,
        preemptions=stats.preemptions,
        prefix_cache_queries=stats.prefix_cache_queries,
        prefix_cache_hits=stats.prefix_cache_hits,
        swaps=stats.swaps,
        late_compiles=late_compiles,
        speculation=stats.speculation,
        stats=executor_pb2.EngineStats(
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
        ),
    )
    report.MergeFrom(info)
    return report


def _histogram(histogram: Histogram) -> executor_pb2.Histogram:
    return executor_pb2.Histogram(bounds=histogram.bounds, counts=histogram.counts, total=histogram.total)
