"""The engine: requests in, steps, tokens out. Single-threaded; the clock is injected."""

import os
import time
from collections.abc import Callable

from scalellm.services.executor.engine.admission_check import check_request
from scalellm.services.executor.engine.batch import (
    Logprobs,
    ModelRunnerProtocol,
    SampledBatch,
    ScheduledBatch,
    ScheduledSequence,
)
from scalellm.services.executor.engine.batch_scheduler import BatchScheduler
from scalellm.services.executor.engine.block_manager import BlockManager
from scalellm.services.executor.engine.books import Books, EngineHistograms, EngineLoad, EngineStats, LinkCredits
from scalellm.services.executor.engine.capacity import make_capacity
from scalellm.services.executor.engine.compiling import Compiling
from scalellm.services.executor.engine.config import EngineConfig, EngineConfigError
from scalellm.services.executor.engine.fault_search import FaultSearch
from scalellm.services.executor.engine.grammar import GrammarCompiler
from scalellm.services.executor.engine.pipeline import Pipeline
from scalellm.services.executor.engine.prefill_budget import PrefillBudget
from scalellm.services.executor.engine.reports import StepCounts, make_load, make_stats
from scalellm.services.executor.engine.request import (
    AbortReason,
    EngineRequest,
    FinishReason,
    RequestKey,
    RequestStatus,
    SampleFinish,
    SupersededError,
)
from scalellm.services.executor.engine.sampling_params import InvalidRequestError
from scalellm.services.executor.engine.sequence import Sequence, SequenceGroup, SequenceStatus
from scalellm.services.executor.engine.speculation import Speculator
from scalellm.services.executor.engine.step_result import LinkResult, StepResult
from scalellm.services.executor.engine.step_time import StepTimeFit, StepTimeModel
from scalellm.services.executor.engine.stop import stop_reason
from scalellm.services.executor.engine.swap import SwapCost, Swapper

_ABORTS = {
    AbortReason.CANCELLED: (FinishReason.CANCELLED, RequestStatus.CANCELLED),
    AbortReason.STOP: (FinishReason.STOP, RequestStatus.OK),
    AbortReason.DEADLINE: (FinishReason.DEADLINE, RequestStatus.DEADLINE_EXCEEDED),
}


class Engine:
    """Continuous batching over one model runner.

    A step has three parts that share nothing but the batch: schedule, run, process. With a runner that overlaps, the
    next step is scheduled and launched before the last one is processed, so step() returns the results of the step that
    the previous call launched. Results of add() and abort() are returned by the next step(). After an exception in the
    runner the requests of that step start again with the tokens they have, in smaller steps, until the one with which
    the runner fails is alone: it ends with INTERNAL, and all others go on. If the device itself is lost, step() raises
    DeviceLostError, and the engine can no longer be used.
    """

    def __init__(
        self,
        config: EngineConfig,
        runner: ModelRunnerProtocol,
        clock: Callable[[], float] = time.monotonic,
        swap_cost: SwapCost | None = None,
        grammars: GrammarCompiler | None = None,
        step_times: StepTimeFit | None = None,
        speculator: Speculator | None = None,
    ) -> None:
        if config.num_host_blocks and swap_cost is None:
            raise EngineConfigError(f"num_host_blocks ({config.num_host_blocks}) need a swap_cost to be weighed by")
        self.config = config
        self.histograms = EngineHistograms()
        self._compiling = Compiling(grammars)
        self._clock = clock
        self._blocks = BlockManager(
            config.num_blocks,
            config.block_size,
            enable_prefix_cache=config.enable_prefix_cache,
            block_run=config.block_run,
        )
        self._capacity = make_capacity(config)
        self._prefill_budget = PrefillBudget(config.target_itl, config.min_prefill_chunk)
        self._step_times = step_times or StepTimeFit()
        self._swapper = Swapper(config.num_host_blocks, swap_cost, self._blocks, self._prefill_budget)
        self._scheduler = BatchScheduler(config, self._blocks, self._capacity, self._prefill_budget, self._swapper)
        self._speculator = speculator
        self._pipeline = Pipeline(runner, clock)
        self._faults = FaultSearch()
        self._books = Books()
        self._result = StepResult()
        self._num_arrivals = 0
        self._counts = StepCounts()

    def add(self, request: EngineRequest) -> None:
        """Accept a request, or raise InvalidRequestError naming the field and the limit.

        An earlier attempt of the same execution ends as SUPERSEDED. Raises SupersededError if a later one runs here.
        """
        try:
            check_request(request, self.config)
            self._books.check_new(request.key)
            self._compiling.check(request.grammar)
            group = self._make_group(request)
            self._capacity.check(group)
            self._supersede(request)
            self._compiling.start(group)
        except (InvalidRequestError, SupersededError):
            self._books.rejected += 1
            raise
        self._num_arrivals += 1
        self._books.enter(group)
        self._scheduler.add(group)
        now = self._clock()
        for seq in group.samples:
            # A resumed sample may have its last token already, but have been moved before its end was reported.
            if seq.status is not SequenceStatus.FINISHED and (stop := stop_reason(seq)) is not None:
                self._finish_sample(seq, *stop, now)
        if group.num_unfinished == 0 and self._books.get(group.key) is group:
            self._finish_request(group, RequestStatus.OK, "", now)

    def abort(self, key: RequestKey, index: int | None = None, reason: AbortReason = AbortReason.CANCELLED) -> None:
        """End a request, or one sample of it, at once. Unknown keys, indices and ended samples are ignored.

        A request whose last open sample is ended this way ends OK if any of its samples ended by itself.
        """
        group = self._books.get(key)
        if group is None:
            return
        finish_reason, status = _ABORTS[reason]
        now = self._clock()
        if index is None:
            self._end_request(group, finish_reason, status, "", now)
        elif 0 <= index < len(group.samples) and group.samples[index].status is not SequenceStatus.FINISHED:
            self._finish_sample(group.samples[index], finish_reason, None, now)

    def give_back(self, key: RequestKey, message: str) -> None:
        """End a request, if it is here, as MOVED, without ends of its samples: it can go on elsewhere or later."""
        group = self._books.get(key)
        if group is None:
            return
        now = self._clock()
        for seq in reversed(group.samples):
            if seq.status is not SequenceStatus.FINISHED:
                self._scheduler.remove(seq, now)
        self._finish_request(group, RequestStatus.MOVED, message, now)

    def give_all_back(self, message: str) -> None:
        """End every request as MOVED."""
        for key in self._books.unfinished():
            self.give_back(key, message)

    def drop_link(self, link: int) -> None:
        """Cancel all requests of a link that was closed, and forget its counters."""
        now = self._clock()
        for group in self._books.of_link(link):
            self._end_request(group, FinishReason.CANCELLED, RequestStatus.CANCELLED, "the link was dropped", now)
        self._books.forget_link(link)

    def has_unfinished(self) -> bool:
        """True if step() has work to do or results to return."""
        return len(self._books) > 0 or len(self._pipeline) > 0 or self._result.has_ends

    @property
    def takes_grammars(self) -> bool:
        """True if requests may have a grammar."""
        return self._compiling.takes_grammars

    @property
    def only_awaits_grammars(self) -> bool:
        """True if no step can run until a grammar is compiled, or a slow mask is computed."""
        is_held = len(self._compiling) == len(self._books) or self._scheduler.is_held_by_masks
        return is_held and len(self._books) > 0 and not (self._pipeline or self._result.has_ends)

    def step(self, before_launch: Callable[[ScheduledBatch], None] = lambda batch: None) -> StepResult:
        """Launch a step, process the due one, and return all results since the last call. Raises DeviceLostError.
        `before_launch` is called with the batch of the step.
        """
        started = self._clock()
        for group in self._books.expired(started):
            status, message = RequestStatus.DEADLINE_EXCEEDED, "the deadline has passed"
            self._end_request(group, FinishReason.DEADLINE, status, message, started)
        for group, error in self._compiling.take():
            self._end_request(group, FinishReason.ERROR, RequestStatus.INVALID, error, started)
        if self._pipeline.withholds_tokens:
            self._finish_step()
            started = self._clock()
        self._scheduler.only = on_trial = self._faults.on_trial()
        batch = self._schedule(started)
        if on_trial is not None and not (batch.sequences or batch.has_swaps or self._pipeline):
            # Paused requests may hold the blocks that the suspects need; once preempted, the suspects fit.
            for group in self._scheduler.running_groups():
                if group.arrival not in on_trial:
                    self._scheduler.roll_back(group, started)
            batch = self._schedule(started)
        num_ahead = 0
        if batch.sequences or batch.has_swaps:
            before_launch(batch)
            self._counts.steps += 1
            num_ahead = int(self._pipeline.launch(batch, started))
        while len(self._pipeline) > num_ahead:
            self._finish_step()
        self._pipeline.draw()
        result, self._result = self._result, StepResult()
        return result

    def load(self) -> EngineLoad:
        """Return the gauges; O(1)."""
        return make_load(self._blocks, self._books, self._scheduler, self._swapper)

    def step_time(self) -> StepTimeModel | None:
        """Return the model of step times fitted to past steps; None before there were enough steps."""
        return self._step_times.line()

    def stats(self) -> EngineStats:
        """Return the counters; O(1)."""
        return make_stats(self._counts, self._books, self._scheduler, self._swapper, self._speculator, self._pipeline)

    @property
    def num_hashed_blocks(self) -> int:
        """Block hashes computed since start: at most one per block of tokens, even across preemptions."""
        return self._blocks.num_hashed_blocks

    def has_request(self, key: RequestKey) -> bool:
        """True if the request was accepted and has not ended."""
        return self._books.get(key) is not None

    def link_credits(self, link: int) -> LinkCredits:
        """Return what a link has used, cumulatively; O(1)."""
        return self._books.credits(link)

    def check_integrity(self) -> None:
        """Raise AssertionError unless blocks, sequences and requests add up; O(everything), for tests."""
        self._blocks.check_integrity(self._scheduler.running())
        self._swapper.check_integrity(self._scheduler.waiting())
        self._books.check_integrity()
        stats, load = self.stats(), self.load()
        ended = stats.finished + stats.cancelled + stats.deadline_exceeded + stats.failed
        if stats.accepted != ended + load.running + load.waiting:
            raise AssertionError(f"requests do not add up: {stats}, {load}")

    def _supersede(self, request: EngineRequest) -> None:
        """End the running attempt of an execution for a new one. Raises SupersededError if the running one is later."""
        older = self._books.of_execution(request.execution_id)
        if older is None:
            return
        running = older.request.attempt
        if request.attempt < running:
            raise SupersededError(request.attempt, running)
        message = f"attempt {running} of this request gave way to attempt {request.attempt}, which came later"
        self._end_request(older, FinishReason.CANCELLED, RequestStatus.SUPERSEDED, message, self._clock())

    def _result_of(self, group: SequenceGroup) -> LinkResult:
        return self._result.links[group.key[0]]

    def _make_group(self, request: EngineRequest) -> SequenceGroup:
        seed = request.sampling.seed
        return SequenceGroup(
            request,
            arrival=self._num_arrivals,
            now=self._clock(),
            seed=int.from_bytes(os.urandom(8), "little") if seed is None else seed,
            eos_token_ids=self.config.eos_token_ids,
            max_model_len=self.config.max_model_len,
        )

    def _schedule(self, now: float) -> ScheduledBatch:
        batch = self._scheduler.schedule(now)
        for group in batch.started:
            self._books.started(group)
            self.histograms.queue_seconds.observe(now - group.added_at)
            if group.request.sampling.prompt_logprobs is not None:
                self._result_of(group).add_prompt_logprobs(group, 0, [Logprobs(0.0, [])])
            if self.config.enable_prefix_cache:
                self._counts.prefix_cache_queries += group.num_prompt_tokens
                self._counts.prefix_cache_hits += group.cached_tokens
        # No drafts while suspects run: the search must find the request, not the draft, with which steps fail.
        if self._speculator is not None and self._pipeline.takes_drafts and self._scheduler.only is None:
            self._speculator.extend(batch, self._blocks, self.config.max_num_seqs)
        return batch

    def _finish_step(self) -> None:
        outcome = self._pipeline.wait()
        batch, now = outcome.batch, outcome.finished_at
        if batch.sequences:
            self.histograms.step_seconds.observe(outcome.seconds)
            self.histograms.step_tokens.observe(batch.num_tokens)
            self.histograms.step_sequences.observe(len(batch.sequences) - batch.num_drafts)
        if isinstance(outcome.sampled, Exception):
            self._fail(batch, outcome.sampled, now)
        else:
            if not batch.has_swaps:  # the time of swaps would be attributed to tokens
                if not batch.num_drafts:  # drafts and prefill never share a step
                    self._prefill_budget.observe(batch.num_decodes, batch.num_prefill_tokens, outcome.seconds)
                self._step_times.observe(batch, outcome.seconds)
                if self._speculator is not None:
                    self._speculator.observe(batch, outcome.seconds)
            self._process(batch, outcome.sampled, now)

    def _process(self, batch: ScheduledBatch, sampled: SampledBatch, now: float) -> None:
        self._counts.computed_tokens += batch.num_tokens
        draw = 0  # index of the sequence's first drawn token in the results
        for index, scheduled in enumerate(batch.sequences):
            seq = scheduled.seq
            group = seq.group
            if not scheduled.is_due:
                draw += 1
                continue
            if index in sampled.failed and seq.status is not SequenceStatus.FINISHED:
                message = "the model computed values that are not finite"
                self._end_request(group, FinishReason.ERROR, RequestStatus.INTERNAL, message, now)
            # For a sequence that has ended or lost its blocks since the launch, this step's results are dropped.
            if seq.status is SequenceStatus.RUNNING:
                if scheduled.draft is not None and self._speculator is not None:
                    self._speculator.accept(seq)
                self._blocks.publish(seq, scheduled.position)
                if scheduled.prompt_logprobs:
                    self._report_prompt_logprobs(group, scheduled, index, sampled)
                if group.pending and scheduled.position >= group.num_prompt_tokens:
                    self._scheduler.fork(seq)
                if scheduled.samples and draw in sampled.misfits:
                    message = sampled.misfits[draw]
                    self._end_request(group, FinishReason.ERROR, RequestStatus.INVALID, message, now)
                elif scheduled.samples:
                    self._append_token(seq, draw, sampled, now)
            draw += scheduled.samples

    def _append_token(self, seq: Sequence, draw: int, sampled: SampledBatch, now: float) -> None:
        token_id = sampled.token_ids[draw]
        self._result.has_first |= seq.num_output_tokens == 0 or not seq.group.has_new_tokens
        self._result_of(seq.group).add_token(seq, token_id, sampled.logprobs.get(draw))
        self._counts.generated_tokens += 1
        seq.token_ids.append(token_id)
        seq.num_pending_tokens -= 1
        seq.group.mark_token(now)
        stop = stop_reason(seq)
        if stop is not None:
            self._finish_sample(seq, *stop, now)

    def _report_prompt_logprobs(
        self, group: SequenceGroup, scheduled: ScheduledSequence, index: int, sampled: SampledBatch
    ) -> None:
        entries = sampled.prompt_logprobs[index]
        self._result_of(group).add_prompt_logprobs(group, scheduled.prompt_logprobs.start + 1, entries)
        group.next_prompt_logprob = scheduled.prompt_logprobs.stop + 1

    def _fail(self, failed: ScheduledBatch, error: Exception, now: float) -> None:
        """Roll back a failed step's requests. One alone in it is the culprit and ends; else the search begins."""
        self._counts.failed_steps += 1
        self._result.error = self._result.error or error
        suspects = failed.live_groups()
        others: dict[int, SequenceGroup] = {}
        for batch in self._pipeline.discard():  # launched after it, with invalid inputs
            others |= batch.live_groups()
        for group in (suspects | others).values():
            self._scheduler.roll_back(group, now)
        if len(failed.groups()) > 1:
            self._faults.divide(sorted(suspects.values(), key=lambda group: group.arrival))
        else:
            message = f"the model runner failed ({type(error).__name__})"
            for group in suspects.values():
                self._result.culprits.append(group.request)
                self._end_request(group, FinishReason.ERROR, RequestStatus.INTERNAL, message, now)

    def _finish_sample(self, seq: Sequence, reason: FinishReason, stop_token_id: int | None, now: float) -> None:
        """End one sample. With the last one its request ends."""
        group = seq.group
        self._remove_sample(seq, reason, stop_token_id, now)
        if group.num_unfinished == 0:
            reasons = {sample.finish_reason for sample in group.samples}
            status = RequestStatus.OK
            if not reasons & {FinishReason.STOP, FinishReason.LENGTH}:
                past = FinishReason.DEADLINE in reasons
                status = RequestStatus.DEADLINE_EXCEEDED if past else RequestStatus.CANCELLED
            self._finish_request(group, status, "", now)

    def _end_request(
        self, group: SequenceGroup, reason: FinishReason, status: RequestStatus, message: str, now: float
    ) -> None:
        """End all samples of a request that still run, and the request."""
        for seq in reversed(group.samples):
            if seq.status is not SequenceStatus.FINISHED:
                self._remove_sample(seq, reason, None, now)
        self._finish_request(group, status, message, now)

    def _remove_sample(self, seq: Sequence, reason: FinishReason, stop_token_id: int | None, now: float) -> None:
        self._scheduler.remove(seq, now)
        seq.finish_reason = reason
        seq.group.num_unfinished -= 1
        finish = SampleFinish(seq.group.key, seq.index, reason, stop_token_id)
        self._result_of(seq.group).samples_finished.append(finish)

    def _finish_request(self, group: SequenceGroup, status: RequestStatus, message: str, now: float) -> None:
        self._capacity.release(group)
        self._compiling.drop(group)
        if self._speculator is not None:
            self._speculator.end(group)
        self._result_of(group).finished.append(self._books.leave(group, status, message, now))
        group.samples = []  # breaks the reference cycle between group and samples
