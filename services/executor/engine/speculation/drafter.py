"""Drafts of a sample's next tokens, from texts that it may be repeating."""

from collections.abc import Sequence as ReadOnlySequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Protocol

from scalellm.services.executor.engine.sequence import Sequence, SequenceGroup
from scalellm.services.executor.engine.speculation.finished_answers import FinishedAnswers
from scalellm.services.executor.engine.speculation.text_index import FORCED, GRAM, LONGEST_MATCH, Match, TextIndex

_INDEXED_PER_STEP = 4096
"""Most tokens of a text that are indexed per step, which takes a millisecond or two, however long a prompt is."""


@dataclass(frozen=True, slots=True)
class Draft:
    """Predicted next tokens, in order.

    match_length: Number of tokens before them that also precede them in the text that they are taken from; FORCED for
        tokens that a grammar leaves no choice about.
    """

    token_ids: ReadOnlySequence[int]
    match_length: int

    def length_at(self, place: int) -> int:
        """Return the length of the match before the draft token at `place`, the earlier draft tokens included, at most
        LONGEST_MATCH.
        """
        return FORCED if self.match_length == FORCED else min(self.match_length + place, LONGEST_MATCH)


class Drafter(Protocol):
    """Predicts tokens. Drafts affect the speed of an answer, never its tokens."""

    def draft(self, seq: Sequence, most: int) -> Draft | None:
        """Return a draft of at most `most` tokens for a sample all of whose tokens are known; None if nothing
        matches.
        """

    def end(self, group: SequenceGroup) -> None:
        """Forget a request that has ended. Its answers may be kept for later drafts."""


class SuffixDrafter:
    """Looks for the last tokens of a sample in its own answer, its prompt, the request's prediction, and recent answers
    with the same cache salt (prompt lookup decoding, Saxena 2023). The longest match is used.
    """

    def __init__(self) -> None:
        self._answers = FinishedAnswers()
        self._own: dict[Sequence, TextIndex] = {}
        self._given: dict[int, list[TextIndex]] = {}

    def draft(self, seq: Sequence, most: int) -> Draft | None:
        """Return the tokens that followed an earlier occurrence of the sample's last tokens, as far as its grammar
        allows, or the text that its grammar leaves no choice about if that is longer.
        """
        draft = self._repeated(seq, most)
        if seq.matcher is None:
            return draft
        if seq.matcher.is_slow:  # each draft token would need one more slow mask
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
        if best.text is context:  # a text that repeats itself is expected to go on repeating
            token_ids = list(islice(cycle(token_ids), most))
        return Draft(token_ids, best.length) if token_ids else None

    def end(self, group: SequenceGroup) -> None:
        """Forget a request, but keep those of its answers that ended by themselves."""
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
    """Match an answer of fewer than GRAM tokens with the beginning of the request's prediction; None if they differ."""
    prediction, count = seq.group.request.prediction_token_ids, seq.num_output_tokens
    if 0 < count < GRAM and prediction[:count] == tuple(seq.token_ids[-count:]):
        return Match(prediction, count, count)
    return None
