"""The batch of a step and its results: the interface between the batch scheduler and the model runner."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from scalellm.services.executor.engine.request import TopLogprobs
from scalellm.services.executor.engine.sequence import Sequence, SequenceGroup


@dataclass(slots=True)
class ScheduledSequence:
    """Compute tokens `[start, start + num_tokens)` of a sequence.

    samples: the chunk reaches the sequence's end, so its last logits give the next token.
    first_new_block: block-table entries from here on are new to the runner; 0 says that the row is new as a whole.
    token_pending: the one input token is the one that the previous step samples in the same row; it is only on the
    device yet, so `seq.token_ids` ends before `start`.
    prompt_logprobs: positions `[first, last)` of the chunk whose logits score the prompt token that follows.
    draft: the one input token is this draft token, a prediction of the token that the row before it, of the same
    sequence, draws.
    """

    seq: Sequence
    start: int
    num_tokens: int
    samples: bool
    first_new_block: int
    token_pending: bool = False
    prompt_logprobs: range = range(0)
    draft: int | None = None

    @property
    def is_due(self) -> bool:
        """False for a row of a rejected draft: its own draft token, or one before it, differs from the drawn token."""
        return self.draft is None or (len(self.seq.token_ids) == self.position and self.seq.token_ids[-1] == self.draft)

    @property
    def position(self) -> int:
        """Position of the token to be sampled: the number of tokens before it, pending ones included."""
        return self.start + self.num_tokens

    @property
    def num_output_tokens(self) -> int:
        """Output tokens that precede the one to be sampled."""
        return self.position - self.seq.group.num_prompt_tokens


@dataclass(slots=True)
class ScheduledBatch:
    """The work of a step: swap_outs, then swap_ins, then block_copies, and then the sequences in order (decodes first).

    The swaps are (device block, host block) pairs, the copies (source, target). Blocks that are swapped out or copied
    may be overwritten later in the same step. A batch may have swaps but no sequences, when the only running sequence
    was preempted for lack of blocks; `launch` is then not called.

    Of the `num_decodes` rows `num_drafts` are drafts. `started` are the requests that left the waiting queue for the
    first time, `swapped_out` the sequences whose blocks are swapped out.
    """

    step: int
    sequences: list[ScheduledSequence] = field(default_factory=list)
    num_decodes: int = 0
    num_drafts: int = 0
    num_tokens: int = 0
    swap_outs: list[tuple[int, int]] = field(default_factory=list)
    swap_ins: list[tuple[int, int]] = field(default_factory=list)
    block_copies: list[tuple[int, int]] = field(default_factory=list)
    started: list[SequenceGroup] = field(default_factory=list)
    swapped_out: list[Sequence] = field(default_factory=list)

    @property
    def num_prefill_tokens(self) -> int:
        """Tokens of prefill chunks; decodes, of one token each, are not counted."""
        return self.num_tokens - self.num_decodes

    @property
    def has_only_decodes(self) -> bool:
        """True if no chunks of prompts are computed."""
        return self.num_decodes == len(self.sequences)

    @property
    def scores_prompts(self) -> bool:
        """True if log-probabilities of prompt tokens are asked for."""
        return any(scheduled.prompt_logprobs for scheduled in self.sequences)

    @property
    def draws_late(self) -> bool:
        """True if a grammar's mask depends on a token that is only on the device yet, so that drawing has to wait for
        it.
        """
        return any(one.token_pending and one.seq.matcher is not None for one in self.sequences)

    @property
    def has_swaps(self) -> bool:
        """True if blocks move between device and host."""
        return bool(self.swap_outs or self.swap_ins)

    def groups(self) -> dict[int, SequenceGroup]:
        """Return the batch's requests, by arrival, including those that have ended since it was formed."""
        sequences = (*(scheduled.seq for scheduled in self.sequences), *self.swapped_out)
        return {seq.group.arrival: seq.group for seq in sequences}

    def live_groups(self) -> dict[int, SequenceGroup]:
        """Return the batch's requests that have not ended since it was formed, by arrival."""
        return {arrival: group for arrival, group in self.groups().items() if group.samples}


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Natural-log probability of one token, from the raw logits, and the most likely alternatives."""

    logprob: float
    top: TopLogprobs


@dataclass(slots=True)
class SampledBatch:
    """The results of a step.

    token_ids: one per scheduled sequence that samples, in batch order. logprobs: for those of them that asked, by
    index in `token_ids`. prompt_logprobs: one list per scheduled sequence with prompt_logprobs positions, by index
    in `ScheduledBatch.sequences`, one entry per position. failed: indices in `ScheduledBatch.sequences` for which the
    model gave non-finite values; none of their results may be used. misfits: error messages of samples' grammars, by
    index in `token_ids`; these tokens are invalid.
    """

    token_ids: list[int]
    logprobs: dict[int, Logprobs] = field(default_factory=dict)
    prompt_logprobs: dict[int, list[Logprobs]] = field(default_factory=dict)
    failed: set[int] = field(default_factory=set)
    misfits: Mapping[int, str] = field(default_factory=dict)


class PendingStep(Protocol):
    """A launched step, which may still be running."""

    def draw(self) -> None:
        """Start drawing the tokens, if that was postponed until the previous step's tokens were known."""

    def wait(self) -> SampledBatch:
        """Wait for the step and return its results. Called once per step, in the order of launches. May raise.

        Sequences have changed since the launch, or since `draw`, and must not be read here. If drawing was postponed
        and `draw` was never called, there are no tokens.
        """


@dataclass(frozen=True, slots=True)
class CompletedStep:
    """A step that was complete when `launch` returned."""

    sampled: SampledBatch

    def draw(self) -> None:
        """Do nothing: the tokens are drawn."""

    def wait(self) -> SampledBatch:
        """Return the results of the step."""
        return self.sampled


class ModelRunnerProtocol(Protocol):
    """Runs steps in the order of the calls. If it raises, the engine rolls back the sequences of that step and of the
    step launched after it, and goes on, unless the device is lost.
    """

    @property
    def overlaps(self) -> bool:
        """True if `launch` returns before the step is complete, so that the next step should be launched meanwhile."""

    @property
    def has_equal_rows(self) -> bool:
        """True if the results of each row of a decode step are, to the last bit, independent of the other rows. A
        runner may find that out with its first step.
        """

    def swap(self, outs: list[tuple[int, int]], ins: list[tuple[int, int]]) -> None:
        """Copy whole cache blocks, in every layer, to the host and then back from it: (device block, host block).

        Host blocks are `0 .. EngineConfig.num_host_blocks - 1`; called only where there are any.
        """

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        """Copy whole cache blocks, (source, target), in every layer; no target is also a source."""

    def launch(self, batch: ScheduledBatch) -> PendingStep:
        """Start a step: the forward pass over the batch, and sampling unless `draws_late`. Sequences are read here and
        in the step's `draw` only.
        """

    def check_device(self) -> None:
        """Check, after a failed step, that the device can run another one. Raises any exception if no later step of
        this process can succeed.
        """


class DeviceLostError(Exception):
    """The device is unusable for this process, for instance after an illegal memory access; a new process can go on."""
