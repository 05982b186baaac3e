"""One sample on its way through its grammar."""

import re
from collections.abc import Sequence

from llguidance import LLMatcher, LLTokenizer

_LONGEST_MESSAGE = 400
_INNER_STATE = re.compile("<state>|<non-verbose/>")


class LlMatcher:
    """A matcher of llguidance, and how many of the sample's tokens it knows.

    Args:
        matcher: behind the sample's first `num_known` output tokens.
        tokenizer: The vocabulary that the grammar was compiled with.
        num_known: see above.
    """

    __slots__ = ("_num_known", "_tokenizer", "matcher")

    def __init__(self, matcher: LLMatcher, tokenizer: LLTokenizer, num_known: int = 0) -> None:
        self.matcher = matcher
        self._tokenizer = tokenizer
        self._num_known = num_known

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


def error_of(matcher: LLMatcher) -> str:
    """Return why a matcher cannot go on, empty while it can."""
    if not matcher.is_error():
        return ""
    told = _INNER_STATE.split(matcher.get_error())[0].strip() or "it cannot be kept to"
    if told.startswith("NoExtension"):
        return "no token of the model's vocabulary goes on as it demands: some character cannot be written with them"
    return told if len(told) <= _LONGEST_MESSAGE else f"{told[:_LONGEST_MESSAGE]}..."
