"""The state of a request inside the engine: a SequenceGroup of n samples, each a Sequence."""

import enum
from dataclasses import dataclass, field

from scalellm.services.executor.engine.grammar import Compilation, Matcher
from scalellm.services.executor.engine.request import EngineRequest, FinishReason, RequestKey, Timings, Usage


class SequenceStatus(enum.Enum):
    """State of a sequence. Only a RUNNING one holds blocks and a row."""

    WAITING = "waiting"
    PENDING_FORK = "pending_fork"
    """The sample waits until the group's leader has computed the prompt, whose blocks it will share."""
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class HostCopy:
    """The cache content of a preempted sequence in host memory: its first `num_tokens` tokens, from block `first_block`
    on.
    """

    first_block: int
    blocks: list[int]
    num_tokens: int


@dataclass(slots=True, eq=False)
class Sequence:
    """One sample: its tokens, and how many of them are computed.

    There are no phases: a step computes tokens `[num_computed_tokens, ...)`, and samples the next token when that
    reaches the end (vLLM v1). Block tables only grow; an entry changes only by copy-on-write.

    A step may be launched before the previous one is processed. `num_computed_tokens` and `num_pending_tokens` are the
    state after all launched steps have run; `token_ids` are the tokens that the host knows already.
    """

    group: "SequenceGroup"
    index: int
    token_ids: list[int]
    """Prompt and output, as far as the output is known."""
    status: SequenceStatus = SequenceStatus.WAITING
    num_computed_tokens: int = 0
    """Tokens whose keys and values are in the cache, or will be when the launched steps have run."""
    num_pending_tokens: int = 0
    """Tokens that launched steps sample and that are not known yet; 0 or 1 whenever a step is scheduled."""
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    """Chained hashes of the leading full blocks; a function of the tokens, so it outlives preemption."""
    num_published_blocks: int = 0
    """Leading blocks already offered to the prefix cache."""
    num_sent_blocks: int = 0
    """Leading block-table entries that the runner knows."""
    row: int = -1
    """Index in the runner's persistent per-sequence buffers; -1 while it does not run."""
    last_scheduled_step: int = -1
    is_preempted: bool = False
    """True if it waits because it was preempted."""
    host_copy: HostCopy | None = None
    """The blocks that were swapped out, while it waits."""
    finish_reason: FinishReason | None = None
    matcher: Matcher | None = None
    """State of the sample's text in the request's grammar, until the sample ends; None = no grammar."""
    sort_key: tuple[int, int, int] = field(init=False)
    """Order of running: lower priority value, then earlier arrival, then lower index."""

    def __post_init__(self) -> None:
        self.sort_key = (self.group.request.priority, self.group.arrival, self.index)

    @property
    def num_tokens(self) -> int:
        """Number of tokens, the pending one included."""
        return len(self.token_ids) + self.num_pending_tokens

    @property
    def has_own_end(self) -> bool:
        """True if it ended by itself, so that its text is complete."""
        return self.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)

    @property
    def num_lost_tokens(self) -> int:
        """Tokens to compute for a waiting sequence, prefix-cache hits not subtracted."""
        return len(self.token_ids) - (self.host_copy.num_tokens if self.host_copy else 0)

    @property
    def awaits_last_token(self) -> bool:
        """True if the sequence ends with the pending token because of its length, whichever token it is."""
        return self.num_pending_tokens > 0 and self.num_tokens >= self.group.max_len

    def awaits_mask(self) -> bool:
        """Return whether it cannot draw yet because its grammar's mask is slow. If so, the mask's computation
        starts.
        """
        matcher = self.matcher
        if matcher is None or not matcher.is_slow:
            return False
        return self.num_pending_tokens > 0 or not matcher.has_mask(self.token_ids, self.group.num_prompt_tokens)

    def drop_matcher(self) -> None:
        """Drop the state of the sample's text in its grammar once it has ended, and cancel the mask it waits for."""
        if self.matcher is not None:
            self.matcher.cancel()
            self.matcher = None

    @property
    def num_output_tokens(self) -> int:
        """Number of output tokens, those of an earlier executor included."""
        return len(self.token_ids) - self.group.num_prompt_tokens


class SequenceGroup:
    """A request: its samples, their common limits, and its usage and timings so far."""

    def __init__(
        self,
        request: EngineRequest,
        *,
        arrival: int,
        now: float,
        seed: int,
        eos_token_ids: frozenset[int],
        max_model_len: int,
    ) -> None:
        self.request = request
        self.arrival = arrival
        self.seed = seed
        """The request's seed; each sample's own derives from it and the index (`kernels.sample_seed`)."""
        self.num_prompt_tokens = len(request.prompt_token_ids)
        sampling = request.sampling
        # Where the grammar's text is complete, only an end token may follow, so a grammar needs one.
        self.eos_ids = frozenset() if sampling.ignore_eos and not request.grammar else eos_token_ids
        self.stop_ids = self.eos_ids | sampling.stop_token_ids
        self.compilation: Compilation | None = None
        """The compilation of its grammar, until which it may not run; None = done, or no grammar."""
        room = max_model_len - self.num_prompt_tokens
        self.max_tokens = room if sampling.max_tokens is None else min(sampling.max_tokens, room)
        """Output tokens per sample, clipped to the context."""
        self.needs_known_tokens = sampling.has_penalties
        """True if the host must know every token before it can launch the step that samples the next."""
        self.samples = [Sequence(self, index, list(request.prompt_token_ids)) for index in range(sampling.n)]
        for resumed in request.resumed:
            sample = self.samples[resumed.index]
            sample.token_ids.extend(resumed.token_ids)
            if resumed.finished is not None:
                sample.status = SequenceStatus.FINISHED
                sample.finish_reason = resumed.finished
        self.num_unfinished = sum(s.status is not SequenceStatus.FINISHED for s in self.samples)
        self.pending: list[Sequence] = []
        """Samples in state PENDING_FORK, by index."""
        self.next_prompt_logprob = 1
        """First prompt position whose log-probability has not been reported; position 0 has none."""

        self.cached_tokens = 0
        self.num_drafts = 0
        """Drafted tokens that a step has verified."""
        self.num_accepted_drafts = 0
        self.num_preemptions = 0
        self.added_at = now
        self._first_scheduled_at: float | None = None
        self._first_token_at: float | None = None
        self._last_token_at: float | None = None
        self._num_preempted = 0
        self._preempted_since = 0.0
        self._preempted_time = 0.0

    @property
    def key(self) -> RequestKey:
        """The caller's key of the request."""
        return self.request.key

    @property
    def was_scheduled(self) -> bool:
        """True if the request has left the waiting queue at least once."""
        return self._first_scheduled_at is not None

    def banned_at(self, num_output_tokens: int) -> frozenset[int]:
        """Return the stop tokens that may not follow `num_output_tokens` tokens, unless a grammar allows no other
        token.
        """
        sampling = self.request.sampling
        if num_output_tokens < sampling.min_tokens:
            return self.stop_ids
        return self.eos_ids if sampling.ignore_eos else frozenset()

    @property
    def max_len(self) -> int:
        """Most tokens of a sample, prompt included."""
        return self.num_prompt_tokens + self.max_tokens

    @property
    def wants_prompt_logprobs(self) -> bool:
        """True if log-probabilities of prompt positions have still to be reported."""
        return self.request.sampling.prompt_logprobs is not None and self.next_prompt_logprob < self.num_prompt_tokens

    @property
    def max_cached_tokens(self) -> int:
        """Leading tokens that may be taken from the prefix cache. Positions whose log-probabilities are still to be
        reported must be computed.
        """
        return self.next_prompt_logprob - 1 if self.wants_prompt_logprobs else self.max_len

    def mark_scheduled(self, now: float, cached_tokens: int) -> None:
        """Record that the request leaves the waiting queue for the first time."""
        self._first_scheduled_at = now
        self.cached_tokens = min(cached_tokens, self.num_prompt_tokens)

    @property
    def has_new_tokens(self) -> bool:
        """True if a sample has got a token here."""
        return self._first_token_at is not None

    def mark_token(self, now: float) -> None:
        """Record the time of a sample's new token."""
        if self._first_token_at is None:
            self._first_token_at = now
        self._last_token_at = now

    def mark_preempted(self, now: float) -> None:
        """Record that a sample was preempted."""
        self.num_preemptions += 1
        if self._num_preempted == 0:
            self._preempted_since = now
        self._num_preempted += 1

    def mark_readmitted(self, now: float) -> None:
        """Record that a preempted sample runs again, or ended while it waited."""
        self._num_preempted -= 1
        if self._num_preempted == 0:
            self._preempted_time += now - self._preempted_since

    def usage(self) -> Usage:
        """Return the tokens consumed so far; O(n samples)."""
        return Usage(
            prompt_tokens=self.num_prompt_tokens,
            completion_tokens=sum(sample.num_output_tokens for sample in self.samples),
            cached_tokens=self.cached_tokens,
            num_preemptions=self.num_preemptions,
            num_resumed=sum(len(resumed.token_ids) for resumed in self.request.resumed),
            accepted_drafts=self.num_accepted_drafts,
            rejected_drafts=self.num_drafts - self.num_accepted_drafts,
        )

    def timings(self, now: float) -> Timings:
        """Return the durations of a request that ends now. A stage that was not reached lasts 0, the current one until
        now.
        """
        scheduled = now if self._first_scheduled_at is None else self._first_scheduled_at
        first = now if self._first_token_at is None else self._first_token_at
        last = first if self._last_token_at is None else self._last_token_at
        return Timings(
            total=now - self.added_at,
            queue=scheduled - self.added_at,
            prefill=first - scheduled,
            decode=last - first,
            preempted=self._preempted_time,
        )
