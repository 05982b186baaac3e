"""One sample on its way through its grammar."""

import re
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLTokenizer

_LONGEST_MESSAGE = 400
_INNER_STATE = re.compile("<state>|<non-verbose/>")
WORD_BITS = 32
"""Tokens that one word of a mask tells of."""
_SLOW_S = 1e-3
"""CPU seconds of a mask above which a matcher is slow. Masks of JSON mostly take 0.01 to 0.1 ms; those of a recursive
grammar have been seen to take 40 ms."""
_QUICK_S = 0.5e-3
"""CPU seconds up to which a mask of a slow matcher is quick."""
_NUM_TO_PROVE = 8
"""Quick masks in a row after which a slow matcher is slow no longer."""


@dataclass(slots=True)
class Pace:
    """The speed of a compiled grammar's masks so far; all its matchers share it.

    Attributes:
        is_quick: some matcher has left the thread for the steps, and none has taken long there since.
    """

    is_quick: bool = False


class LlMatcher:
    """A matcher of llguidance, and how many of the sample's tokens it knows.

    The masks of a quick matcher are computed within the steps, together with those of other samples. Those of a slow
    one are computed in a thread of their own: the sample sits out the steps until its mask is there, and nobody else
    waits for it. A matcher is slow at first, unless its grammar has been quick before, and again from the first mask
    that takes long within a step (`judge`). Its pace changes when the sample's tokens come, never which tokens.

    Args:
        matcher: behind the sample's first `num_known` output tokens.
        tokenizer: The vocabulary that the grammar was compiled with.
        thread: Computes the masks of all slow matchers, one after the other.
        pace: of the grammar.
    """

    __slots__ = ("_made", "_made_behind", "_num_known", "_num_to_prove", "_pace", "_thread", "_tokenizer", "matcher")

    def __init__(self, matcher: LLMatcher, tokenizer: LLTokenizer, thread: ThreadPoolExecutor, pace: Pace) -> None:
        self.matcher = matcher
        self._tokenizer = tokenizer
        self._thread = thread
        self._pace = pace
        self._num_known = 0
        self._num_to_prove = 0 if pace.is_quick else _NUM_TO_PROVE
        self._made: Future[tuple[npt.NDArray[np.int32], float]] | None = None
        self._made_behind = -1

    @property
    def is_slow(self) -> bool:
        """True if its masks are computed in the thread, before the steps."""
        return self._num_to_prove > 0

    def follow(self, token_ids: Sequence[int], start: int = 0) -> None:
        """Take note of the output tokens since the last call. One that does not fit the grammar is an error of it.

        Args:
            token_ids: Tokens of the sample.
            start: Position at which its output begins among them.
        """
        new = token_ids[start + self._num_known :]
        if new:
            self.matcher.consume_tokens(list(new))
            self._num_known += len(new)

    def has_mask(self, token_ids: Sequence[int], start: int = 0) -> bool:
        """Return whether the thread has computed the mask behind these tokens. If not it does from now on."""
        if self._made is None or self._made_behind != len(token_ids):
            self._made_behind = len(token_ids)
            self._made = self._thread.submit(self._make, list(token_ids), start)
        return self._made.done()

    def take_mask(self, token_ids: Sequence[int]) -> npt.NDArray[np.int32] | None:
        """Return the mask that the thread has computed behind these tokens, None if it was not asked to.

        The array has a bit for each token of the vocabulary, as `Masks.rows` does.
        """
        if self._made is None or self._made_behind != len(token_ids):
            return None
        mask, seconds = self._made.result()
        if seconds > _QUICK_S:
            self._num_to_prove = _NUM_TO_PROVE
        elif self._num_to_prove:
            self._num_to_prove -= 1
            self._pace.is_quick |= not self._num_to_prove
        return mask

    def judge(self, seconds: float) -> None:
        """Take note of the CPU seconds that a mask took within a step."""
        if seconds > _SLOW_S:
            self._num_to_prove = _NUM_TO_PROVE
            self._pace.is_quick = False

    def num_allowed(self, token_ids: Sequence[int]) -> int:
        """Return how many of these tokens may come next, in their order."""
        return self.matcher.validate_tokens(list(token_ids))

    def forced(self) -> Sequence[int]:
        """Return tokens whose text must come next, as long as possible each; empty where there is a choice."""
        text = self.matcher.compute_ff_bytes()
        return self._tokenizer.tokenize_bytes(text) if text else []

    @property
    def error(self) -> str:
        """The error in the grammar, in a line or a few; empty while there is none."""
        return error_of(self.matcher)

    def _make(self, token_ids: Sequence[int], start: int) -> tuple[npt.NDArray[np.int32], float]:
        """Compute the mask behind these tokens; runs in the thread. Returns it and the CPU seconds that it took."""
        started = time.thread_time()
        self.follow(token_ids, start)
        mask = np.empty(num_words(self._tokenizer.vocab_size), np.int32)
        self.matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        return mask, time.thread_time() - started


def num_words(vocab_size: int) -> int:
    """Return the words of a mask; llguidance's own masks may have one more."""
    return -(-vocab_size // WORD_BITS)


def error_of(matcher: LLMatcher) -> str:
    """Return why a matcher cannot go on, empty while it can."""
    if not matcher.is_error():
        return ""
    told = _INNER_STATE.split(matcher.get_error())[0].strip() or "it cannot be kept to"
    if told.startswith("NoExtension"):
        return "no token of the model's vocabulary goes on as it demands: some character cannot be written with them"
    return told if len(told) <= _LONGEST_MESSAGE else f"{told[:_LONGEST_MESSAGE]}..."
