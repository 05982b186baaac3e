"""Converts batches to plans for the other ranks."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import fields

from scalellm.services.executor.engine.batch import ScheduledBatch, ScheduledSequence
from scalellm.services.executor.engine.sampling_params import SamplingParams
from scalellm.v1 import common_pb2, ranks_pb2

SAMPLES, TOKEN_PENDING, DRAFT = 1, 2, 4
"""Bits of `RankStep.flags`."""

_NOT_COPIED = ("logit_bias", "stop_token_ids", "seed")


class PlanWriter:
    """Writes the plans of steps, and tracks how many tokens of each row the other ranks have."""

    def __init__(self) -> None:
        self._told: dict[int, int] = {}

    def step(self, batch: ScheduledBatch) -> ranks_pb2.RankStep:
        """Return the plan of a step: the changes since the last one, a few bytes per sequence."""
        plan = ranks_pb2.RankStep(step=batch.step, num_decodes=batch.num_decodes, masked=is_masked(batch))
        for place, scheduled in enumerate(batch.sequences):
            self._add(plan, place, scheduled)
        return plan

    def _add(self, plan: ranks_pb2.RankStep, place: int, scheduled: ScheduledSequence) -> None:
        seq, first = scheduled.seq, scheduled.first_new_block
        if first == 0:
            self._told[seq.row] = 0
            plan.new_sequences.append(_sequence(scheduled))
        plan.rows.append(seq.row)
        plan.starts.append(scheduled.start)
        plan.num_tokens.append(scheduled.num_tokens)
        flags = SAMPLES * scheduled.samples + TOKEN_PENDING * scheduled.token_pending
        if scheduled.draft is not None:
            flags += DRAFT
            plan.drafts.append(scheduled.draft)
        plan.flags.append(flags)
        plan.first_new_blocks.append(first)
        plan.block_counts.append(len(seq.block_table) - first)
        plan.blocks.extend(seq.block_table[first:])
        told = self._told[seq.row]
        plan.token_counts.append(len(seq.token_ids) - told)
        plan.token_ids.extend(seq.token_ids[told:])
        self._told[seq.row] = len(seq.token_ids)
        if scores := scheduled.prompt_logprobs:
            plan.scores.append(ranks_pb2.RankScore(place=place, first=scores.start, count=len(scores)))


def is_masked(batch: ScheduledBatch) -> bool:
    """Return whether a sample of a step has a grammar."""
    return any(scheduled.samples and scheduled.seq.matcher is not None for scheduled in batch.sequences)


def block_pairs(pairs: Items[tuple[int, int]]) -> ranks_pb2.BlockPairs:
    """Return (source, target) pairs as columns."""
    return ranks_pb2.BlockPairs(sources=[pair[0] for pair in pairs], targets=[pair[1] for pair in pairs])


def _sequence(scheduled: ScheduledSequence) -> ranks_pb2.RankSequence:
    seq, group = scheduled.seq, scheduled.seq.group
    return ranks_pb2.RankSequence(
        seed=group.seed,
        index=seq.index,
        num_prompt_tokens=group.num_prompt_tokens,
        sampling=_sampling(group.request.sampling),
        has_grammar=bool(group.request.grammar),
    )


def _sampling(params: SamplingParams) -> common_pb2.SamplingParams:
    """Return parameters as `sampling_from_wire` reads them, without the seed, which the sequence has."""
    names = [field.name for field in fields(params) if field.name not in _NOT_COPIED]
    return common_pb2.SamplingParams(
        **{name: value for name in names if (value := getattr(params, name)) is not None},
        logit_bias=[common_pb2.LogitBias(token_id=key, bias=value) for key, value in params.logit_bias.items()],
        stop_token_ids=params.stop_token_ids,
    )
