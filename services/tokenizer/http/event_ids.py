"""Ids of a stream's events. A client that sends its request again, with the last id that it received, gets the rest."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Self

from scalellm.services.common.errors import StatusError
from scalellm.services.tokenizer.http.answer_format import Format
from scalellm.services.tokenizer.sample_stream import Delta
from scalellm.services.tokenizer.validation import is_id
from scalellm.v1 import generation_pb2

HEADER = "last-event-id"
_CHOICE = re.compile(r"(\d{1,9})(?:\+(\d{1,4}))?(\.?)", re.ASCII)


@dataclass(frozen=True, slots=True)
class ChoicePlace:
    """The position in one choice.

    Attributes:
        num_tokens: Tokens that the client has.
        num_events: Events that it has in addition, of those that belong to the next tokens or the end.
        has_end: True if it has the end.
    """

    num_tokens: int = 0
    num_events: int = 0
    has_end: bool = False

    @classmethod
    def read(cls, text: str) -> Self | None:
        """Parse the text that `str` returns for a place; None if it is invalid."""
        found = _CHOICE.fullmatch(text)
        return cls(int(found[1]), int(found[2] or 0), bool(found[3])) if found else None

    def __str__(self) -> str:
        events = f"+{self.num_events}" if self.num_events else ""
        return f"{self.num_tokens}{events}{'.' if self.has_end else ''}"


@dataclass(frozen=True, slots=True)
class Place:
    """The position up to which a client has read an answer.

    Attributes:
        request_id: Id of the request.
        choices: The position in each choice.
    """

    request_id: str
    choices: Sequence[ChoicePlace]

    @classmethod
    def read(cls, event_id: str) -> Self:
        """Parse an event's id. Raises StatusError if it is invalid."""
        request_id, _, rest = event_id.rpartition("/")
        choices = [ChoicePlace.read(text) for text in rest.split(",")]
        if not is_id(request_id) or None in choices:
            raise StatusError.invalid(HEADER, f"is not the id of an event: {event_id[:256]!r}")
        return cls(request_id, [choice for choice in choices if choice is not None])

    def seen(self, num_prompts: int, num_samples: int) -> list[Sequence[ChoicePlace]]:
        """Return the positions in each prompt's samples. Raises StatusError if the request has another number of
        choices.
        """
        num_choices = num_prompts * num_samples
        if len(self.choices) != num_choices:
            raise StatusError.invalid(
                HEADER, f"must have a number for each of the {num_choices} choices, got {len(self.choices)}"
            )
        return [self.choices[start : start + num_samples] for start in range(0, num_choices, num_samples)]


class NumberedFormat(Format):
    """A format whose events have ids, if the answer is kept: `REQUEST_ID/PLACE`, with a ChoicePlace for each choice.

    Args:
        format: Writes the events.
        request_id: Id of the request.
        num_prompts: Prompts of the request.
        num_samples: Samples of each prompt. Not checked against the limit until the first generation has started.
        seen: The position of the client in each sample of each prompt, if it resumes. Events before it are left out.
    """

    def __init__(
        self,
        format: Format,
        request_id: str,
        num_prompts: int,
        num_samples: int,
        seen: Sequence[Sequence[ChoicePlace]] | None = None,
    ) -> None:
        self._format = format
        self._head = f"id: {request_id}/"
        self._num_samples = num_samples
        self._seen = seen
        self._counts: list[list[int]] = [[] for _ in range(num_prompts)]
        """Number of tokens of each sample that were passed to the format."""
        self._places: list[list[ChoicePlace]] = [[] for _ in range(num_prompts)]
        self._is_kept = True

    def start(self, prompt: int, started: generation_pb2.Started) -> str:
        """Return the text for an accepted generation."""
        self._is_kept &= started.resumable
        self._counts[prompt] = [0] * self._num_samples
        none = [ChoicePlace()] * self._num_samples
        self._places[prompt] = list(self._seen[prompt]) if self._seen is not None else none
        return self._format.start(prompt, started)

    def prompt_logprobs(self, prompt: int, part: generation_pb2.PromptLogprobs) -> str:
        """Return the text for prompt log-probabilities, unless the client has tokens and therefore has these, too."""
        text = self._format.prompt_logprobs(prompt, part)
        return "" if any(place.num_tokens for place in self._places[prompt]) else text

    def delta(self, prompt: int, delta: Delta) -> str:
        """Return the events for tokens, without those that the client has."""
        text, index = self._format.delta(prompt, delta), delta.index
        self._counts[prompt][index] += delta.num_tokens
        count, place = self._counts[prompt][index], self._places[prompt][index]
        if place.has_end or (delta.num_tokens and count <= place.num_tokens):
            return ""
        return self._numbered(text, prompt, index, ChoicePlace(count))

    def sample_end(self, prompt: int, sample: generation_pb2.SampleFinished) -> str:
        """Return the events for the end of a choice, unless the client has it."""
        text, place = self._format.sample_end(prompt, sample), self._places[prompt][sample.index]
        if place.has_end:
            return ""
        return self._numbered(text, prompt, sample.index, ChoicePlace(place.num_tokens, has_end=True))

    def end(self, finished: Sequence[generation_pb2.Finished]) -> str:
        """Return the last events. They have no ids, so a client that has some of them gets all of them again."""
        return self._format.end(finished)

    def _numbered(self, text: str, prompt: int, index: int, after: ChoicePlace) -> str:
        """Return the events with ids, except those that the client has, and advance the place to `after`."""
        if not self._is_kept:
            return text
        places = self._places[prompt]
        before, numbered = places[index], []
        events = text.split("\n\n")[:-1]  # events contain JSON, which has no line breaks
        for number, event in enumerate(events, 1):
            places[index] = after if number == len(events) else ChoicePlace(before.num_tokens, number)
            if number > before.num_events:
                numbered.append(f"{event}\n{self._head}{','.join(map(str, chain.from_iterable(self._places)))}\n\n")
        places[index] = after
        return "".join(numbered)
