"""Counts the tokens of reasoning in an answer."""

from __future__ import annotations

from collections.abc import Sequence

from scalellm.services.tokenizer.dialect.splitter import AnswerSplitter
from scalellm.services.tokenizer.text.detokenizer import Detokenizer


class ReasoningTokens:
    """Counts the tokens of one sample that stand between the marks of its reasoning, as a budget of reasoning does.

    It reads the answer token by token, so how tokens are batched on their way changes nothing, and stop texts that hold
    back text do not either.

    Args:
        splitter: At the beginning of the answer; nothing else reads with it. The mark that ends reasoning is one token.
        detokenizer: Nothing else reads with it either; it shows marks.

    Attributes:
        count: So far.
    """

    __slots__ = ("_detokenizer", "_splitter", "count")

    def __init__(self, splitter: AnswerSplitter, detokenizer: Detokenizer) -> None:
        self._splitter: AnswerSplitter | None = splitter
        self._detokenizer = detokenizer
        self.count = 0

    def push(self, token_ids: Sequence[int]) -> None:
        """Read more of the answer, but no token that ends it."""
        splitter = self._splitter
        if splitter is None:
            return
        for token_id in token_ids:
            was_in_reasoning = splitter.is_in_reasoning
            splitter.push(self._detokenizer.push((token_id,)))
            if was_in_reasoning and splitter.is_in_reasoning:
                self.count += 1
            if splitter.is_behind_reasoning:
                self._splitter = None
                return
