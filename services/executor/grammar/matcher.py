"""The state of one sample's text in its grammar."""

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
"""Number of tokens per word of a mask."""
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
    """A matcher of llguidance, and the number of the sample's tokens that it has consumed.

    The masks of a quick matcher are computed within the steps, together with those of other samples. Those of a slow
    matcher are computed in a thread: the sample skips steps until its mask is available, and no other sample waits. A
    matcher is slow at first, unless its grammar has been quick before, and becomes slow again with the first mask that
    takes long within a step (`judge`). This affects the speed of an answer, never its tokens.

    Args:
        matcher: The matcher of llguidance, before the sample's first output token.
        tokenizer: The vocabulary that the grammar was compiled with.
        thread: Computes the masks of all slow matchers, one after the other.
        pace: Pace of the grammar, shared by its matchers.
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
        """Advance through the output tokens since the last call. A token that the grammar does not allow sets `error`.

        Args:
            token_ids: Tokens of the sample.
            start: Position at which its output begins among them.
        """
        new = token_ids[start + self._num_known :]
        if new:
            self.matcher.consume_tokens(list(new))
            self._num_known += len(new)

    def has_mask(self, token_ids: Sequence[int], start: int = 0) -> bool:
        """Return whether the thread has computed the mask after these tokens. If it was not asked to, it starts now."""
        if self._made is None or self._made_behind != len(token_ids):
            self._made_behind = len(token_ids)
            self._made = self._thread.submit(self._make, list(token_ids), start)
        return self._made.done()

    def cancel(self) -> None:
        """Take a mask that nobody will draw from out of the thread's queue, where those of other samples wait."""
        if self._made is not None:
            self._made.cancel()

    def take_mask(self, token_ids: Sequence[int]) -> npt.NDArray[np.int32] | None:
        """Return the mask after these tokens that the thread has computed, waiting for it; None if none was asked for.

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
        """Make the matcher slow if a mask within a step took too many CPU seconds."""
        if seconds > _SLOW_S:
            self._num_to_prove = _NUM_TO_PROVE
            self._pace.is_quick = False

    def num_allowed(self, token_ids: Sequence[int]) -> int:
        """Return how many of these tokens may come next, in their order."""
        return self.matcher.validate_tokens(list(token_ids))

    def forced(self) -> Sequence[int]:
        """Return tokens, each as long as possible, of the text that must come next; empty if there is a choice."""
        text = self.matcher.compute_ff_bytes()
        return self._tokenizer.tokenize_bytes(text) if text else []

    @property
    def error(self) -> str:
        """The grammar's error message, of one or a few lines; empty while there is none."""
        return error_of(self.matcher)

    def _make(self, token_ids: Sequence[int], start: int) -> tuple[npt.NDArray[np.int32], float]:
        """Compute the mask after these tokens. Runs in the thread. Returns it and the CPU seconds that it took."""
        started = time.thread_time()
        self.follow(token_ids, start)
        mask = np.empty(num_words(self._tokenizer.vocab_size), np.int32)
        self.matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        return mask, time.thread_time() - started


def num_words(vocab_size: int) -> int:
    """Return the number of words of a mask. llguidance's own masks may have one more."""
    return -(-vocab_size // WORD_BITS)


def error_of(matcher: LLMatcher) -> str:
    """Return why a matcher cannot go on, empty while it can."""
    if not matcher.is_error():
        return ""
    told = _INNER_STATE.split(matcher.get_error())[0].strip() or "it cannot be kept to"
    if told.startswith("NoExtension"):
        return "no token of the model's vocabulary goes on as it demands: some character cannot be written with them"
    return told if len(told) <= _LONGEST_MESSAGE else f"{told[:_LONGEST_MESSAGE]}..."
