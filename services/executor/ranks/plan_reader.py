"""Converts rank 0's plans to batches."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass
from dataclasses import field as data_field

from scalellm.services.executor.engine.batch import ScheduledBatch, ScheduledSequence
from scalellm.services.executor.engine.config import EngineConfig
from scalellm.services.executor.engine.request import EngineRequest
from scalellm.services.executor.engine.sequence import Sequence, SequenceGroup
from scalellm.services.executor.engine_link import sampling_from_wire
from scalellm.services.executor.ranks.plan_writer import DRAFT, SAMPLES, TOKEN_PENDING
from scalellm.v1 import ranks_pb2

_A_GRAMMAR = "of rank 0"


class ToldMatcher:
    """Placeholder for a sample's matcher, which rank 0 has. Rank 0 sends the masks."""

    is_slow = False

    def has_mask(self, token_ids: object, start: int = 0) -> bool:
        """Return True: rank 0 sends the mask with the step."""
        return True

    def cancel(self) -> None:
        """Do nothing: rank 0 computes the masks."""

    def follow(self, token_ids: object, start: int = 0) -> None:
        """Do nothing."""

    def num_allowed(self, token_ids: object) -> int:
        """Return 0: rank 0 makes the drafts."""
        return 0

    def forced(self) -> Items[int]:
        """Return no tokens: rank 0 makes the drafts."""
        return ()


@dataclass(slots=True)
class ToldBatch(ScheduledBatch):
    """A step of rank 0. With `masked`, its draw waits for the masks."""

    masked: bool = data_field(default=False, kw_only=True)

    @property
    def draws_late(self) -> bool:
        """True if the draw waits for the masks."""
        return self.masked


class PlanReader:
    """Keeps copies of rank 0's sequences by row, with the fields that a model runner reads."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._of_row: dict[int, Sequence] = {}

    def step(self, plan: ranks_pb2.RankStep) -> ToldBatch:
        """Return the batch of a plan."""
        batch = ToldBatch(plan.step, num_decodes=plan.num_decodes, num_tokens=sum(plan.num_tokens), masked=plan.masked)
        new, drafts = iter(plan.new_sequences), iter(plan.drafts)
        blocks, token_ids = _parts(plan.blocks, plan.block_counts), _parts(plan.token_ids, plan.token_counts)
        columns = zip(
            plan.rows,
            plan.starts,
            plan.num_tokens,
            plan.flags,
            plan.first_new_blocks,
            blocks,
            token_ids,
            strict=True,
        )
        for row, start, num_tokens, flags, first, new_blocks, tokens in columns:
            if first == 0:
                self._of_row[row] = self._sequence(row, next(new), tokens)
            else:
                self._of_row[row].token_ids += tokens
            seq = self._of_row[row]
            seq.block_table[first:] = new_blocks
            samples, pending = bool(flags & SAMPLES), bool(flags & TOKEN_PENDING)
            draft = next(drafts) if flags & DRAFT else None
            batch.sequences.append(ScheduledSequence(seq, start, num_tokens, samples, first, pending, draft=draft))
        for score in plan.scores:
            batch.sequences[score.place].prompt_logprobs = range(score.first, score.first + score.count)
        return batch

    def _sequence(self, row: int, told: ranks_pb2.RankSequence, token_ids: list[int]) -> Sequence:
        request = EngineRequest(
            (0, row),
            "",
            tuple(token_ids[: told.num_prompt_tokens]),
            sampling_from_wire(told.sampling),
            grammar=_A_GRAMMAR if told.has_grammar else "",
        )
        group = SequenceGroup(
            request,
            arrival=0,
            now=0.0,
            seed=told.seed,
            eos_token_ids=self._config.eos_token_ids,
            max_model_len=self._config.max_model_len,
        )
        group.samples = []  # sequences are found by row, not by group
        seq = Sequence(group, told.index, token_ids)
        seq.row = row
        seq.matcher = ToldMatcher() if told.has_grammar else None
        return seq


def _parts(values: Items[int], counts: Items[int]) -> Iterator[list[int]]:
    at = 0
    for count in counts:
        yield list(values[at : at + count])
        at += count
