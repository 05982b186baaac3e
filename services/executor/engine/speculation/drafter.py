"""Guesses at what a sample says next, from texts that it may be repeating."""

from collections.abc import Sequence as ReadOnlySequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Protocol

from scalellm.services.executor.engine.sequence import Sequence, SequenceGroup
from scalellm.services.executor.engine.speculation.finished_answers import FinishedAnswers
from scalellm.services.executor.engine.speculation.text_index import FORCED, GRAM, LONGEST_MATCH, Match, TextIndex

_INDEXED_PER_STEP = 4096
"""Tokens of a text that are taken note of in a step: a millisecond or two, however long a prompt is."""


@dataclass(frozen=True, slots=True)
class Draft:
    """Tokens that may come next, in order.

    match_length: Number of tokens before them that are the same ones in the text that they are taken from; FORCED for
        tokens that a grammar gave.
    """

    token_ids: ReadOnlySequence[int]
    match_length: int

    def length_at(self, place: int) -> int:
        """Return the length of the match behind which the token at a place stands, as far as it is compared."""
        return FORCED if self.match_length == FORCED else min(self.match_length + place, LONGEST_MATCH)


class Drafter(Protocol):
    """Guesses tokens. What it guesses changes when tokens come, never which."""

    def draft(self, seq: Sequence, most: int) -> Draft | None:
        """Return what may follow the tokens of a sample, all of which are known: at most `most` tokens, None if there
        is nothing to go by.
        """

    def end(self, group: SequenceGroup) -> None:
        """A request has ended, with its samples as they are."""


class SuffixDrafter:
    """Looks for the last tokens of a sample in its own answer, its prompt, the prediction that came with the request,
    and the answers of late with the same cache salt (prompt lookup decoding, Saxena 2023); the longest match counts.
    """

    def __init__(self) -> None:
        self._answers = FinishedAnswers()
        self._own: dict[Sequence, TextIndex] = {}
        self._given: dict[int, list[TextIndex]] = {}

    def draft(self, seq: Sequence, most: int) -> Draft | None:
        """Return what followed the last tokens of a sample where they stood before, as far as its grammar allows; what
        its grammar leaves no choice about if that is more.
        """
        draft = self._repeated(seq, most)
        if seq.matcher is None:
            return draft
        if seq.matcher.is_slow:  # each guess would take one more of its masks
            return None
        seq.matcher.follow(seq.token_ids, seq.group.num_prompt_tokens)
        allowed = draft.token_ids[: seq.matcher.num_allowed(draft.token_ids)] if draft is not None else ()
        forced = seq.matcher.forced()[:most]
        if draft is not None and allowed and len(allowed) >= len(forced):
            return Draft(allowed, draft.match_length)
        return Draft(forced, FORCED) if forced else None

    def _repeated(self, seq: Sequence, most: int) -> Draft | None:
        context, matches = seq.token_ids, []
        for index in self._indices(seq):
            index.extend(_INDEXED_PER_STEP)
            matches.append(index.find(context))
        matches.append(self._answers.find(seq.group.request.cache_salt, context))
        best = max((match for match in matches if match is not None), key=lambda match: match.length, default=None)
        best = best or _beginning(seq)
        if best is None:
            return None
        token_ids = best.text[best.at : best.at + most]
        if best.text is context:  # what repeats itself goes on to
            token_ids = list(islice(cycle(token_ids), most))
        return Draft(token_ids, best.length) if token_ids else None

    def end(self, group: SequenceGroup) -> None:
        """Keep the answers of a request that reached their own end, and nothing else of it."""
        self._given.pop(group.arrival, None)
        for seq in group.samples:
            self._own.pop(seq, None)
            if seq.has_own_end:
                self._answers.add(group.request.cache_salt, seq.token_ids[group.num_prompt_tokens :])

    def _indices(self, seq: Sequence) -> list[TextIndex]:
        group = seq.group
        own, given = self._own.get(seq), self._given.get(group.arrival)
        if own is None:
            own = self._own[seq] = TextIndex(seq.token_ids, group.num_prompt_tokens - GRAM)
        if given is None:
            request = group.request
            given = [TextIndex(text) for text in (request.prompt_token_ids, request.prediction_token_ids) if text]
            self._given[group.arrival] = given
        return [own, *given]


def _beginning(seq: Sequence) -> Match | None:
    """Return the place in the prediction of an answer that has only begun, and with the prediction's first tokens."""
    prediction, count = seq.group.request.prediction_token_ids, seq.num_output_tokens
    if 0 < count < GRAM and prediction[:count] == tuple(seq.token_ids[-count:]):
        return Match(prediction, count, count)
    return None
