"""Ids of a stream's events: a client that sends its request again, with the last id it got, is sent the rest."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Self

from scalellm.services.common.errors import StatusError
from scalellm.services.tokenizer.http.sink import Format
from scalellm.services.tokenizer.sample_stream import Delta
from scalellm.services.tokenizer.validation import is_id
from scalellm.v1 import generation_pb2

HEADER = "last-event-id"
_COUNTS = re.compile(r"\d{1,9}(,\d{1,9})*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Place:
    """The position up to which a client has read an answer.

    Attributes:
        request_id: Id of the request.
        counts: Tokens of each choice that it has.
    """

    request_id: str
    counts: Sequence[int]

    @classmethod
    def read(cls, event_id: str) -> Self:
        """Return what an event's id says. Raises StatusError."""
        request_id, _, counts = event_id.rpartition("/")
        if not is_id(request_id) or not _COUNTS.fullmatch(counts):
            raise StatusError.invalid(HEADER, f"is the id of no event: {event_id[:256]!r}")
        return cls(request_id, [int(count) for count in counts.split(",")])

    def seen(self, num_prompts: int, num_samples: int) -> list[Sequence[int]]:
        """Return the counts of each prompt. Raises StatusError where the request has other choices."""
        num_choices = num_prompts * num_samples
        if len(self.counts) != num_choices:
            raise StatusError.invalid(
                HEADER, f"must have a number for each of the {num_choices} choices, got {len(self.counts)}"
            )
        return [self.counts[start : start + num_samples] for start in range(0, num_choices, num_samples)]


class NumberedFormat:
    """A format whose events have ids, if the answer is kept: `REQUEST_ID/TOKENS` with the tokens of each choice so far.

    Args:
        format: Writes the events.
        request_id: Id of the request.
        num_prompts: Prompts of the request.
        num_samples: Samples of each, which may be more than a request may have until the first has started.
        seen: Tokens of each sample of each prompt that the client has, where it goes on: their events are left out.
    """

    def __init__(
        self,
        format: Format,
        request_id: str,
        num_prompts: int,
        num_samples: int,
        seen: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self._format = format
        self._head = f"id: {request_id}/"
        self._num_samples = num_samples
        self._seen = seen
        self._counts: list[list[int]] = [[] for _ in range(num_prompts)]
        self._shown: list[list[int]] = [[] for _ in range(num_prompts)]
        self._is_kept = True

    def start(self, prompt: int, started: generation_pb2.Started) -> str:
        """A generation was accepted."""
        self._is_kept &= started.resumable
        self._counts[prompt] = [0] * self._num_samples
        self._shown[prompt] = list(self._seen[prompt]) if self._seen is not None else [0] * self._num_samples
        return self._format.start(prompt, started)

    def prompt_logprobs(self, prompt: int, part: generation_pb2.PromptLogprobs) -> str:
        """Log-probabilities of a part of a prompt, which who has tokens has, too."""
        text = self._format.prompt_logprobs(prompt, part)
        return "" if any(self._shown[prompt]) else text

    def delta(self, prompt: int, delta: Delta) -> str:
        """New tokens, or ones that the client has."""
        text = self._format.delta(prompt, delta)
        if not self._is_kept:
            return text
        counts, shown, index = self._counts[prompt], self._shown[prompt], delta.index
        counts[index] += delta.num_tokens
        if delta.num_tokens and counts[index] <= shown[index]:
            return ""
        shown[index] = counts[index]
        if not text:
            return ""
        return f"{text[:-1]}{self._head}{','.join(map(str, chain.from_iterable(self._shown)))}\n\n"

    def end(self, finished: Sequence[generation_pb2.Finished]) -> str:
        """Return the end of each choice. These events have no ids: a client that has some of them is sent all again."""
        return self._format.end(finished)
