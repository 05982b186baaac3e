"""The results of a step: per link its new tokens, as columns, log-probabilities, and ends of samples and requests."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from itertools import accumulate

from scalellm.services.executor.engine.batch import Logprobs
from scalellm.services.executor.engine.request import (
    EngineRequest,
    RequestFinish,
    SampleFinish,
    TokenLogprobs,
    TokenOutput,
)
from scalellm.services.executor.engine.sequence import Sequence, SequenceGroup


@dataclass(slots=True)
class LinkResult:
    """The results for one link.

    New tokens are kept as columns, like in the link's frame, because an object per token took most of the time between
    a step and its frame. Run `i` consists of `counts[i]` tokens of the sample `indices[i]` of the request `handles[i]`,
    which had `offsets[i]` tokens before it; `token_ids` are the tokens of all runs, concatenated. `logprobs` has an
    entry per run of the requests that asked for them.
    """

    handles: list[int] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    samples_finished: list[SampleFinish] = field(default_factory=list)
    finished: list[RequestFinish] = field(default_factory=list)

    def add_token(self, seq: Sequence, token_id: int, logprobs: Logprobs | None) -> None:
        """Add the next token of a sample, to the last run if that belongs to the same sample."""
        key = seq.group.key
        if self.handles and self.handles[-1] == key[1] and self.indices[-1] == seq.index:
            self.counts[-1] += 1
        else:
            self.handles.append(key[1])
            self.indices.append(seq.index)
            self.offsets.append(seq.num_output_tokens)
            self.counts.append(1)
            if logprobs is not None:
                num_top = seq.group.request.sampling.logprobs or 0
                self.logprobs.append(TokenLogprobs(key, seq.index, seq.num_output_tokens, [], [], num_top))
        self.token_ids.append(token_id)
        if logprobs is not None:
            self.logprobs[-1].logprobs.append(logprobs.logprob)
            self.logprobs[-1].top_logprobs.append(logprobs.top)

    def add_prompt_logprobs(self, group: SequenceGroup, offset: int, entries: Iterable[Logprobs]) -> None:
        """Add the log-probabilities of the prompt's tokens from position `offset` on."""
        entries = list(entries)
        self.prompt_logprobs.append(
            TokenLogprobs(
                group.key,
                0,
                offset,
                [entry.logprob for entry in entries],
                [entry.top for entry in entries],
                group.request.sampling.prompt_logprobs or 0,
            )
        )

    def extend(self, later: LinkResult) -> None:
        """Add the results of a later step."""
        for column in fields(self):
            getattr(self, column.name).extend(getattr(later, column.name))

    @property
    def has_ends(self) -> bool:
        """True if a sample or a request ended."""
        return bool(self.finished or self.samples_finished)

    def runs(self, link: int) -> Iterator[TokenOutput]:
        """Yield the runs of new tokens, as objects."""
        scored = {(entry.key[1], entry.index, entry.offset): entry for entry in self.logprobs}
        starts = accumulate(self.counts, initial=0)
        for handle, index, offset, count, start in zip(
            self.handles, self.indices, self.offsets, self.counts, starts, strict=False
        ):
            scores = scored.get((handle, index, offset))
            yield TokenOutput(
                (link, handle),
                index,
                offset,
                self.token_ids[start : start + count],
                scores.logprobs if scores else None,
                scores.top_logprobs if scores else None,
            )


@dataclass(slots=True)
class StepResult:
    """The results since the last step, by link. `error` is the runner's exception, for the caller to log, and
    `culprits` are the requests that ended because of it. `has_first` is True if the first token of a sample, or of a
    request that was resumed here, is among the tokens.

    The properties are the results of all links together, for programs that have only one link.
    """

    links: defaultdict[int, LinkResult] = field(default_factory=lambda: defaultdict(LinkResult))
    error: Exception | None = None
    culprits: list[EngineRequest] = field(default_factory=list)
    has_first: bool = False

    @property
    def has_ends(self) -> bool:
        """True if a sample or a request ended."""
        return any(part.has_ends for part in self.links.values())

    @property
    def tokens(self) -> list[TokenOutput]:
        """New tokens, an object per run of consecutive tokens of a sample."""
        return [run for link, part in self.links.items() for run in part.runs(link)]

    @property
    def prompt_logprobs(self) -> list[TokenLogprobs]:
        """Log-probabilities of prompt tokens."""
        return [entry for part in self.links.values() for entry in part.prompt_logprobs]

    @property
    def samples_finished(self) -> list[SampleFinish]:
        """The samples that ended."""
        return [sample for part in self.links.values() for sample in part.samples_finished]

    @property
    def finished(self) -> list[RequestFinish]:
        """The requests that ended."""
        return [finish for part in self.links.values() for finish in part.finished]
