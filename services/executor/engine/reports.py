"""The engine's gauges and counters, put together from its parts."""

from collections.abc import Collection
from dataclasses import dataclass

from scalellm.services.executor.engine.batch_scheduler import BatchScheduler
from scalellm.services.executor.engine.block_manager import BlockManager
from scalellm.services.executor.engine.books import Books, EngineLoad, EngineStats
from scalellm.services.executor.engine.pipeline import Pipeline
from scalellm.services.executor.engine.request import RequestStatus
from scalellm.services.executor.engine.speculation import Speculator
from scalellm.services.executor.engine.swap import Swapper

_ENDED_BY_LINKS = (RequestStatus.CANCELLED, RequestStatus.SUPERSEDED, RequestStatus.MOVED)
_FAILED = (RequestStatus.INTERNAL, RequestStatus.INVALID)


@dataclass(slots=True)
class StepCounts:
    """Counts of steps since start, as in EngineStats."""

    steps: int = 0
    failed_steps: int = 0
    computed_tokens: int = 0
    generated_tokens: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0


def make_load(blocks: BlockManager, books: Books, scheduler: BatchScheduler, swapper: Swapper) -> EngineLoad:
    """Return the gauges; O(1)."""
    return EngineLoad(
        free_blocks=blocks.num_free,
        cached_blocks=blocks.num_cached,
        total_blocks=blocks.num_blocks,
        running=len(books) - books.waiting,
        waiting=books.waiting,
        running_sequences=scheduler.num_running,
        waiting_sequences=scheduler.num_waiting,
        waiting_prefill_tokens=scheduler.waiting_tokens,
        free_host_blocks=swapper.num_free,
        total_host_blocks=swapper.num_blocks,
    )


def make_stats(
    counts: StepCounts,
    books: Books,
    scheduler: BatchScheduler,
    swapper: Swapper,
    speculator: Speculator | None,
    pipeline: Pipeline,
) -> EngineStats:
    """Return the counters; O(1)."""

    def ended(statuses: Collection[RequestStatus]) -> int:
        return sum(books.ended[status] for status in statuses)

    speculation = "off" if speculator is None else "on" if pipeline.takes_drafts else "idle"
    return EngineStats(
        accepted=books.accepted,
        rejected=books.rejected,
        finished=ended((RequestStatus.OK,)),
        cancelled=ended(_ENDED_BY_LINKS),
        deadline_exceeded=ended((RequestStatus.DEADLINE_EXCEEDED,)),
        failed=ended(_FAILED),
        preemptions=scheduler.num_preemptions,
        swaps=swapper.num_swaps,
        swapped_out_blocks=swapper.num_blocks_out,
        swapped_in_blocks=swapper.num_blocks_in,
        steps=counts.steps,
        failed_steps=counts.failed_steps,
        computed_tokens=counts.computed_tokens,
        generated_tokens=counts.generated_tokens,
        drafts=speculator.num_drafts if speculator else 0,
        draft_tokens=speculator.num_draft_tokens if speculator else 0,
        accepted_tokens=speculator.num_accepted_tokens if speculator else 0,
        speculation=speculation,
        prefix_cache_queries=counts.prefix_cache_queries,
        prefix_cache_hits=counts.prefix_cache_hits,
    )
