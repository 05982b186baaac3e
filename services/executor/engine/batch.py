"""One step's work and its outcome: what the scheduler and the model runner exchange."""

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
    token_pending: the one input token is what the step before this one samples in the same row, and only the device
    knows it: `seq.token_ids` ends before `start`.
    prompt_logprobs: positions `[first, last)` of the chunk whose logits score the prompt token that follows.
    draft: the one input token is this guess at what the row before it draws, a row of the same sequence.
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
        """False for a row whose draft, or one before it, was not what was drawn: it computes what never comes."""
        return self.draft is None or (len(self.seq.token_ids) == self.position and self.seq.token_ids[-1] == self.draft)

    @property
    def position(self) -> int:
        """Position of the token to be sampled: how many tokens precede it, known or not."""
        return self.start + self.num_tokens

    @property
    def num_output_tokens(self) -> int:
        """Output tokens that precede the one to be sampled."""
        return self.position - self.seq.group.num_prompt_tokens


@dataclass(slots=True)
class ScheduledBatch:
    """A step: swap_outs, then swap_ins, then block_copies, and then the sequences in order (decodes first).

    The swaps are (device block, host block) pairs, the copies (source, target). Blocks that go out or are copied may be
    overwritten by what comes later in the step. There may be swaps and nothing to run, when the last sequence that runs
    gives way to what it needs itself; the runner is then not asked to launch.

    Of the `num_decodes` rows `num_drafts` are drafts. `started` are the requests that left the waiting queue for the
    first time, `swapped_out` the sequences whose blocks go out.
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
        """Tokens of chunks, as against one token per decode."""
        return self.num_tokens - self.num_decodes

    @property
    def draws_late(self) -> bool:
        """True if what a sample may go on with follows from a token that only the device knows yet."""
        return any(one.token_pending and one.seq.matcher is not None for one in self.sequences)

    @property
    def has_swaps(self) -> bool:
        """True if blocks move between device and host."""
        return bool(self.swap_outs or self.swap_ins)

    def live_groups(self) -> dict[int, SequenceGroup]:
        """Return its requests that have not ended meanwhile, by arrival."""
        sequences = (*(scheduled.seq for scheduled in self.sequences), *self.swapped_out)
        return {seq.group.arrival: seq.group for seq in sequences if seq.group.samples}


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
    model gave non-finite values; nothing of theirs may be used. misfits: errors of the grammars of samples, by index
    in `token_ids`; these tokens mean nothing.
    """

    token_ids: list[int]
    logprobs: dict[int, Logprobs] = field(default_factory=dict)
    prompt_logprobs: dict[int, list[Logprobs]] = field(default_factory=dict)
    failed: set[int] = field(default_factory=set)
    misfits: Mapping[int, str] = field(default_factory=dict)


class PendingStep(Protocol):
    """A step that was launched, perhaps still running."""

    def draw(self) -> None:
        """Start drawing the tokens, if that was put off until those of the step before were known."""

    def wait(self) -> SampledBatch:
        """Return what the step produced, once it has; called once, in the order of launches. It may raise.

        Sequences have moved on since the launch, or since `draw`: nothing of theirs may be read here. If `draw` was to
        draw the tokens and was never called, there are none.
        """


@dataclass(frozen=True, slots=True)
class CompletedStep:
    """A step that was done when `launch` returned."""

    sampled: SampledBatch

    def draw(self) -> None:
        """Nothing: all is done."""

    def wait(self) -> SampledBatch:
        """Return what the step produced."""
        return self.sampled


class ModelRunnerProtocol(Protocol):
    """Runs steps, one after the other in the order of the calls. It may raise: the engine then fails the sequences of
    that step, and of the one launched on top of it, and goes on, if the device can.
    """

    @property
    def overlaps(self) -> bool:
        """True if `launch` returns before the step is done, so that it pays to launch the next one meanwhile."""

    @property
    def has_equal_rows(self) -> bool:
        """True if a decode step computes each row as if it were alone, to the last bit. A runner may learn that with
        its first step.
        """

    def swap(self, outs: list[tuple[int, int]], ins: list[tuple[int, int]]) -> None:
        """Copy whole cache blocks, in every layer, to the host and then back from it: (device block, host block).

        Host blocks are `0 .. EngineConfig.num_host_blocks - 1`; called only where there are any.
        """

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        """Copy whole cache blocks, (source, target), in every layer; no target is also a source."""

    def launch(self, batch: ScheduledBatch) -> PendingStep:
        """Start a step: the model over the batch, and sampling unless it draws late. Sequences are read here, and
        by the step's `draw`.
        """

    def check_device(self) -> None:
        """Return if the device can run another step. Asked after a step that failed; what is raised here says that no
        step of this process can succeed any more.
        """


class DeviceLostError(Exception):
    """The device is lost for this process, as after an illegal access to a GPU's memory: only another one can go on."""
