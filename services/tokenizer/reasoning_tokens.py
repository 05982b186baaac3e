"""Counts the tokens of reasoning in an answer."""

from __future__ import annotations

from collections.abc import Sequence

from scalellm.services.tokenizer.dialect import Part, PartKind
from scalellm.services.tokenizer.dialect.splitter import AnswerSplitter
from scalellm.services.tokenizer.text.detokenizer import Detokenizer


class ReasoningTokens:
    """Counts the tokens between the marks of one sample's reasoning, in the same way as a budget of reasoning.

    The answer is read token by token while reasoning may come, so the count does not depend on how tokens are batched.

    Args:
        splitter: A splitter at the beginning of the answer, for `push`. The mark that ends reasoning must be one token.
        detokenizer: A detokenizer that does not leave out marks, for `push`.

    Attributes:
        count: Reasoning tokens so far.
    """

    __slots__ = ("_detokenizer", "_splitter", "count")

    def __init__(self, splitter: AnswerSplitter, detokenizer: Detokenizer) -> None:
        self._splitter = splitter
        self._detokenizer = detokenizer
        self.count = 0

    def push(self, token_ids: Sequence[int]) -> None:
        """Count further tokens of an answer whose text is not read with `read`, because of stop texts or because no
        text is wanted. The token that ends the answer must be left out.
        """
        if not self._splitter.is_behind_reasoning:
            self.read(token_ids, self._detokenizer, self._splitter)

    def read(
        self, token_ids: Sequence[int], detokenizer: Detokenizer, splitter: AnswerSplitter
    ) -> tuple[str, list[Part]]:
        """Count further tokens of an answer. Returns their text and parts, by the given detokenizer and splitter."""
        texts: list[str] = []
        parts: list[Part] = []
        for place, token_id in enumerate(token_ids):
            if splitter.is_behind_reasoning:
                texts.append(detokenizer.push(token_ids[place:]))
                parts += splitter.push(texts[-1])
                break
            was_in_reasoning = splitter.is_in_reasoning
            texts.append(detokenizer.push((token_id,)))
            for part in splitter.push(texts[-1]):
                if parts and parts[-1].kind is part.kind is PartKind.REASONING:
                    parts[-1] = parts[-1]._replace(text=parts[-1].text + part.text)
                else:
                    parts.append(part)
            self.count += was_in_reasoning and splitter.is_in_reasoning
        return "".join(texts), parts
