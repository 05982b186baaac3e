"""Counts the tokens of reasoning in an answer."""

from __future__ import annotations

from collections.abc import Sequence

from scalellm.services.tokenizer.dialect import Part, PartKind
from scalellm.services.tokenizer.dialect.splitter import AnswerSplitter
from scalellm.services.tokenizer.text.detokenizer import Detokenizer


class ReasoningTokens:
    """Counts the tokens of one sample that stand between the marks of its reasoning, as a budget of reasoning does.

    The answer is read token by token while reasoning may come, so how tokens are batched on their way changes nothing.

    Args:
        splitter: At the beginning of the answer, for `push`. The mark that ends reasoning is one token.
        detokenizer: Shows marks, for `push`.

    Attributes:
        count: Tokens so far.
    """

    __slots__ = ("_detokenizer", "_splitter", "count")

    def __init__(self, splitter: AnswerSplitter, detokenizer: Detokenizer) -> None:
        self._splitter = splitter
        self._detokenizer = detokenizer
        self.count = 0

    def push(self, token_ids: Sequence[int]) -> None:
        """Count more of an answer whose text is not read by `read`: stop texts hold it back, or nobody wants it.

        A token that ends the answer is none of it.
        """
        if not self._splitter.is_behind_reasoning:
            self.read(token_ids, self._detokenizer, self._splitter)

    def read(
        self, token_ids: Sequence[int], detokenizer: Detokenizer, splitter: AnswerSplitter
    ) -> tuple[str, list[Part]]:
        """Count more of an answer, and return its text and parts as this detokenizer and this splitter tell them."""
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
