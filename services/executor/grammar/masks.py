"""Bit masks of the tokens that the samples of a step may draw."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import numpy.typing as npt
from llguidance import LLExecutor

from scalellm.services.executor.engine.batch import ScheduledSequence
from scalellm.services.executor.grammar.matcher import WORD_BITS, LlMatcher, num_words

_ALL = -1  # every bit of a word
_WORD = 2**WORD_BITS - 1
_LONG_S = 2e-3
"""Seconds for all masks of a step above which those of the next step are timed one by one. Timed one by one, the masks
of 64 rows of JSON took 2.6 ms."""


class Masks:
    """The masks of a step, in memory that every step reuses.

    Args:
        num_rows: Most samples in a step.
        vocab_size: Tokens of the model's vocabulary.

    Attributes:
        rows: `[num_rows, ceil(vocab_size / 32)]` i32; bit t % 32 of word t // 32 is set if token t may be drawn.
    """

    def __init__(self, num_rows: int, vocab_size: int) -> None:
        self.rows: npt.NDArray[np.int32] = np.full((num_rows, num_words(vocab_size)), _ALL, np.int32)
        self._vocab_size = vocab_size
        self._filled = np.zeros(num_rows, np.bool_)
        self._executor: LLExecutor | None = None
        self._last_took_long = False

    def fill(self, scheduled: Sequence[ScheduledSequence]) -> Mapping[int, str]:
        """Write the masks of these samples, in order. Samples without a grammar may draw any token.

        The matchers first advance through the tokens that have become known; rows of drafts get the mask after the
        draft. Returns the error messages of grammars by place; the tokens drawn at these places are invalid.
        """
        matchers: dict[int, LlMatcher] = {}
        made: dict[int, npt.NDArray[np.int32]] = {}  # masks that were computed before the step
        # draft tokens by the place of their matcher; their masks are in the rows after it
        drafts: dict[int, list[int]] = {}
        of_matcher: list[int] = []
        for place, one in enumerate(scheduled):
            matcher, is_masked = one.seq.matcher, False
            if isinstance(matcher, LlMatcher):
                is_masked = True
                if one.draft is not None:
                    of_matcher.append(one.draft)
                    self.rows[place] = _ALL  # kept where the grammar does not allow the draft
                elif (mask := matcher.take_mask(one.seq.token_ids)) is not None:
                    matchers[place], drafts[place], made[place] = matcher, (of_matcher := []), mask
                else:
                    matcher.follow(one.seq.token_ids, one.seq.group.num_prompt_tokens)
                    matchers[place], drafts[place] = matcher, (of_matcher := [])
            elif self._filled[place]:
                self.rows[place] = _ALL
            self._filled[place] = is_masked
        if not matchers:
            return {}
        for place, mask in made.items():
            self.rows[place] = mask
        due = {place: matcher for place, matcher in matchers.items() if place not in made or drafts[place]}
        self._compute(due, drafts)
        errors = {place: message for place, matcher in matchers.items() if (message := matcher.error)}
        for first in matchers.keys() - errors.keys():
            for place in range(first, first + 1 + len(drafts[first])):
                if banned := scheduled[place].seq.group.banned_at(scheduled[place].num_output_tokens):
                    self._ban(place, banned)
        return errors

    def pick(self, place: int, number: int) -> int:
        """Return the allowed token of the sample at `place` whose index is `number` modulo the number of allowed
        tokens; 0 if none is allowed.
        """
        bits = np.unpackbits(self.rows[place].view(np.uint8), count=self._vocab_size, bitorder="little")
        token_ids = np.flatnonzero(bits)
        return int(token_ids[number % len(token_ids)]) if len(token_ids) else 0

    def _compute(self, matchers: Mapping[int, LlMatcher], drafts: Mapping[int, list[int]]) -> None:
        """Compute the masks of matchers by place, all in one call, which uses several cores. If that took long, the
        masks of the next step are computed and timed one by one, which is slower, to find the slow matchers.
        """
        if self._executor is None:
            self._executor = LLExecutor()
        width = self.rows.shape[1] * self.rows.itemsize
        target = self.rows.ctypes.data, width, self.rows.shape[0]
        started, timed = time.perf_counter(), self._last_took_long
        if timed:
            for place, matcher in matchers.items():
                began = time.thread_time()
                matcher.matcher.unsafe_compute_mask_ptr(self.rows[place].ctypes.data, width)
                matcher.judge(time.thread_time() - began)
        elif plain := [(one.matcher, place) for place, one in matchers.items() if not drafts[place]]:
            self._executor.unsafe_compute_mask_ptr(plain, *target)
        if ahead := [(one.matcher, place, drafts[place]) for place, one in matchers.items() if drafts[place]]:
            self._executor.unsafe_compute_mask_ptr_with_draft_token(ahead, *target)
        self._last_took_long = not timed and time.perf_counter() - started > _LONG_S

    def _ban(self, place: int, token_ids: Collection[int]) -> None:
        """Remove tokens from a mask, unless it allows no others."""
        row = self.rows[place].view(np.uint32)
        inside = [token_id for token_id in token_ids if int(row[token_id // WORD_BITS]) >> token_id % WORD_BITS & 1]
        if not inside:  # the usual case, as end tokens are allowed only where the text is complete
            return
        rest = row.copy()
        for token_id in inside:
            rest[token_id // WORD_BITS] &= np.uint32(_WORD ^ 1 << token_id % WORD_BITS)
        if rest.any():
            self.rows[place] = rest.view(np.int32)
