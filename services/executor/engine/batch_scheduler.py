"""Forms the batch of every step: continuous batching without phases (vLLM v1's idea)."""

from collections.abc import Container

from scalellm.services.executor.engine.batch import ScheduledBatch, ScheduledSequence
from scalellm.services.executor.engine.block_manager import BlockManager
from scalellm.services.executor.engine.capacity import Capacity
from scalellm.services.executor.engine.config import EngineConfig
from scalellm.services.executor.engine.prefill_budget import PrefillBudget
from scalellm.services.executor.engine.sequence import Sequence, SequenceGroup, SequenceStatus
from scalellm.services.executor.engine.sequence_queue import SequenceQueue
from scalellm.services.executor.engine.swap import Swapper


class BatchScheduler:
    """Chooses each step's work so that every sequence's `num_computed_tokens` catches up with its number of tokens,
    within a token budget per step.

    Decodes come first, so that running streams keep their pace; the rest of the budget goes to prefill chunks and
    newcomers, by priority and arrival. A sequence gets the blocks of all its known tokens when it is admitted, so
    blocks can run out for new tokens only; then the last sequence in running order is preempted.

    Scheduled tokens count as computed at once, so that the next step can be scheduled while this one runs: a sequence
    then goes on from its pending token. Only an end by length is known in advance; an end by a stop token is noticed
    one step late, and that step's token is dropped.

    A sequence is in exactly one place: waiting, running, or pending behind the leader of its group.
    """

    def __init__(
        self,
        config: EngineConfig,
        blocks: BlockManager,
        capacity: Capacity,
        prefill_budget: PrefillBudget,
        swapper: Swapper,
    ) -> None:
        self._max_num_seqs = config.max_num_seqs
        self._max_num_batched_tokens = config.max_num_batched_tokens
        self._blocks = blocks
        self._capacity = capacity
        self._prefill_budget = prefill_budget
        self._swapper = swapper
        self._waiting = SequenceQueue()
        self._running = SequenceQueue()
        self._free_rows = list(range(config.max_num_seqs - 1, -1, -1))
        self._num_reserved_rows = 0
        self._step = 0
        self._is_short = False
        self._masks_are_missing = False
        self.is_held_by_masks = False
        """True if the last scheduled step is empty because the masks of grammars are still being computed."""
        self.only: Container[int] | None = None
        """Arrival numbers of the requests that may run; None = all may."""
        self.num_preemptions = 0
        self.waiting_tokens = 0
        """Tokens to compute for all waiting sequences, prefix-cache hits not subtracted."""

    @property
    def num_waiting(self) -> int:
        """Number of waiting sequences. Samples pending behind a leader are not counted."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Number of running sequences."""
        return len(self._running)

    def running(self) -> list[Sequence]:
        """Return the running sequences, first to last."""
        return list(self._running)

    def running_groups(self) -> list[SequenceGroup]:
        """Return the requests with running sequences, once each."""
        return list({seq.group.arrival: seq.group for seq in self._running}.values())

    def waiting(self) -> list[Sequence]:
        """Return the waiting sequences, first to last."""
        return list(self._waiting)

    def add(self, group: SequenceGroup) -> None:
        """Queue a request. Its first unfinished sample leads; the others fork from it once the prompt is computed."""
        group.pending = [seq for seq in group.samples if seq.status is SequenceStatus.WAITING]
        for seq in group.pending:
            seq.status = SequenceStatus.PENDING_FORK
        self._promote(group)

    def remove(self, seq: Sequence, now: float) -> None:
        """Finish a waiting, running or pending sequence, and free its row, blocks and matcher."""
        group = seq.group
        status, seq.status = seq.status, SequenceStatus.FINISHED
        seq.drop_matcher()
        if status is SequenceStatus.WAITING:
            self._leave_waiting(seq, now)
            self._swapper.drop(seq)
        elif status is SequenceStatus.RUNNING:
            self._leave_running(seq)
        elif status is SequenceStatus.PENDING_FORK:
            group.pending.remove(seq)
            self._num_reserved_rows -= any(s.status is SequenceStatus.RUNNING for s in group.samples)
        self._promote(group)

    def schedule(self, now: float) -> ScheduledBatch:
        """Choose the next step's work. An empty batch means that nothing can run before the step in flight is done."""
        self._step += 1
        self._is_short = self._masks_are_missing = False
        batch = ScheduledBatch(self._step)
        prefills = []
        for seq in list(self._running):
            if seq.status is not SequenceStatus.RUNNING or not self._may_run(seq):
                continue  # preempted for a sequence earlier in this loop, or may not run now
            if self._awaits_mask(seq):
                continue
            if seq.num_tokens - seq.num_computed_tokens > 1:
                prefills.append(seq)
            elif not seq.awaits_last_token and self._make_room(seq, now):
                self._schedule(batch, seq, 1)
        batch.num_decodes = batch.num_tokens
        limit = self._prefill_budget.limit(batch.num_decodes, self._max_num_batched_tokens - batch.num_decodes)
        self._schedule_prefills(batch, prefills, limit, now)
        self.is_held_by_masks = self._masks_are_missing and not batch.sequences
        batch.block_copies = self._blocks.take_copies()
        batch.swap_outs, batch.swap_ins, batch.swapped_out = self._swapper.take_transfers()
        return batch

    def roll_back(self, group: SequenceGroup, now: float) -> None:
        """Requeue a request after a failed step, with the tokens that it has, because its cache content may be corrupt.

        Blocks that it published in earlier steps stay in the prefix cache.
        """
        for seq in group.samples:
            if seq.status is SequenceStatus.RUNNING:
                self._leave_running(seq)
            elif seq.status is SequenceStatus.WAITING:
                self._leave_waiting(seq, now)
                self._swapper.drop(seq)
            if seq.status is not SequenceStatus.FINISHED:
                seq.num_pending_tokens = 0
                seq.status = SequenceStatus.WAITING
        self._capacity.release(group)
        self.add(group)
        leader = next(seq for seq in group.samples if seq.status is SequenceStatus.WAITING)
        leader.is_preempted = True
        group.mark_preempted(now)

    def fork(self, leader: Sequence) -> None:
        """Start the pending samples of a leader whose prompt is computed. They share its blocks.

        Each recomputes the prompt's last token to draw its own first token, which is an ordinary decode row.
        """
        group = leader.group
        for seq in group.pending:
            self._blocks.fork(leader, seq, min(group.num_prompt_tokens, len(seq.token_ids) - 1))
            self._enter_running(seq)
        self._num_reserved_rows -= len(group.pending)
        group.pending = []

    def _schedule_prefills(self, batch: ScheduledBatch, prefills: list[Sequence], budget: int, now: float) -> None:
        running = iter(prefills)
        runner = next(running, None)
        may_admit = True
        while budget > 0:
            newcomer = self._newcomer() if may_admit and not self._is_short else None
            if newcomer is not None and (runner is None or newcomer.sort_key < runner.sort_key):
                if not self._admit(batch, newcomer, now):
                    may_admit = False  # newcomers behind it must not overtake it, or it could starve
                    continue
                seq = newcomer
            elif runner is not None:
                seq, runner = runner, next(running, None)
                if seq.status is not SequenceStatus.RUNNING or not self._make_room(seq, now):
                    continue
            else:
                return
            chunk = min(seq.num_tokens - seq.num_computed_tokens, budget)
            self._schedule(batch, seq, chunk)
            budget -= chunk

    def _schedule(self, batch: ScheduledBatch, seq: Sequence, num_tokens: int) -> None:
        start = seq.num_computed_tokens
        end = start + num_tokens
        group = seq.group
        scheduled = ScheduledSequence(
            seq,
            start,
            num_tokens,
            samples=end == seq.num_tokens,
            first_new_block=seq.num_sent_blocks,
            token_pending=end > len(seq.token_ids),
        )
        if group.wants_prompt_logprobs:
            # The logits of position p score token p + 1.
            scheduled.prompt_logprobs = range(
                max(start, group.next_prompt_logprob - 1), min(end, group.num_prompt_tokens - 1)
            )
        seq.num_computed_tokens = end
        seq.num_pending_tokens += scheduled.samples
        seq.num_sent_blocks = len(seq.block_table)
        seq.last_scheduled_step = self._step
        batch.sequences.append(scheduled)
        batch.num_tokens += num_tokens

    def _admit(self, batch: ScheduledBatch, seq: Sequence, now: float) -> bool:
        group = seq.group
        rows = len(self._running) + self._num_reserved_rows + 1 + len(group.pending)
        if rows > self._max_num_seqs or not self._capacity.may_start(group):
            return False
        spare = self._capacity.spare_blocks(len(self._running))
        if not self._blocks.admit(seq, max_cached_tokens=group.max_cached_tokens, spare=spare):
            return False
        self._leave_waiting(seq, now)
        self._enter_running(seq)
        self._swapper.restore(seq)
        self._num_reserved_rows += len(group.pending)
        self._capacity.reserve(group)
        if not group.was_scheduled:
            group.mark_scheduled(now, seq.num_computed_tokens)
            batch.started.append(group)
        return True

    def _make_room(self, seq: Sequence, now: float) -> bool:
        """Allocate the blocks for a running sequence's tokens, preempting sequences from the end of the running order
        if necessary. Returns False if it cannot run in this step.
        """
        while not self._blocks.extend(seq):
            self._is_short = True
            if any(other.awaits_last_token and other.last_scheduled_step != self._step for other in self._running):
                return False  # a sequence ends with the step in flight and frees its blocks, so none is preempted
            victims = [other for other in reversed(self._running) if other.last_scheduled_step != self._step]
            # Sequences that may not run now go first, because they cannot end and free their blocks.
            victim = next((other for other in victims if not self._may_run(other)), victims[0])
            self._preempt(victim, now)
            if victim is seq:
                return False
        return True

    def _preempt(self, seq: Sequence, now: float) -> None:
        self._swapper.save(seq)
        self._leave_running(seq)
        self.num_preemptions += 1
        # The pending token is drawn again with the same result, since draws depend on the seed and the position alone.
        # The step in flight is processed, and its token dropped, before the sequence runs again, since a schedule that
        # is short of blocks admits none.
        seq.num_pending_tokens = 0
        seq.is_preempted = True
        seq.group.mark_preempted(now)
        self._enter_waiting(seq)

    def _newcomer(self) -> Sequence | None:
        """Return the first waiting sequence that may start now."""
        return next((seq for seq in self._waiting if self._may_run(seq) and not self._awaits_mask(seq)), None)

    def _awaits_mask(self, seq: Sequence) -> bool:
        awaits = seq.awaits_mask()
        self._masks_are_missing |= awaits
        return awaits

    def _may_run(self, seq: Sequence) -> bool:
        return seq.group.compilation is None and (self.only is None or seq.group.arrival in self.only)

    def _promote(self, group: SequenceGroup) -> None:
        """Make a pending sample of a group the new leader, if the old one has ended."""
        led = any(s.status in (SequenceStatus.WAITING, SequenceStatus.RUNNING) for s in group.samples)
        if group.pending and not led:
            # The new leader waits in the queue. Kept there, the group's reservation could block requests ahead of it in
            # the queue, which would then block the leader.
            self._capacity.release(group)
            self._enter_waiting(group.pending.pop(0))

    def _enter_waiting(self, seq: Sequence) -> None:
        seq.status = SequenceStatus.WAITING
        self._waiting.add(seq)
        self.waiting_tokens += seq.num_lost_tokens

    def _leave_waiting(self, seq: Sequence, now: float) -> None:
        self._waiting.remove(seq)
        self.waiting_tokens -= seq.num_lost_tokens
        if seq.is_preempted:
            seq.is_preempted = False
            seq.group.mark_readmitted(now)

    def _enter_running(self, seq: Sequence) -> None:
        seq.status = SequenceStatus.RUNNING
        seq.row = self._free_rows.pop()
        self._running.add(seq)

    def _leave_running(self, seq: Sequence) -> None:
        self._running.remove(seq)
        self._free_rows.append(seq.row)
        seq.row = -1
        self._blocks.free(seq)
        self._num_reserved_rows -= len(seq.group.pending)
