"""A model's way of writing: the meaning of its tokens in answers, and the marks of reasoning and calls among them."""

from __future__ import annotations

from collections.abc import Sequence

from scalellm.services.tokenizer.dialect import dialect_of
from scalellm.services.tokenizer.dialect.opening import Opening
from scalellm.services.tokenizer.text.detokenizer import TokenTexts
from scalellm.services.tokenizer.text.model_tokenizer import ModelTokenizer

_OPENING_TOKENS = 16
"""Last tokens of a prompt that are looked at: as many as have the mark of reasoning with which an answer may begin."""


class Writing:
    """One model's way of writing. Immutable.

    Args:
        model: Its tokenizer.

    Attributes:
        texts: Texts of the model's tokens.
        marked_texts: The same in answers from which reasoning and calls are told: marks are never left out.
        dialect: The form of reasoning and calls.
        added_ids: Tokens that are cut out of a text before all others, special or not, by their texts.
        end_ids: Tokens that end an answer.
    """

    def __init__(self, model: ModelTokenizer) -> None:
        self.texts = TokenTexts(model.tokenizer)
        self.dialect = dialect_of(model.chat_template)
        added = model.tokenizer.get_added_tokens_decoder()
        self.added_ids = {token.content: token_id for token_id, token in added.items()}
        self.marked_texts = self.texts.showing(self.dialect.marker_ids(self.texts.special_ids))
        self.end_ids = model.eos_token_ids

    @property
    def can_count_reasoning(self) -> bool:
        """True if the end of reasoning is a token, so that tokens before it can be counted."""
        return self.dialect.end_of_reasoning in self.added_ids

    def opening(self, prompt_ids: Sequence[int]) -> Opening:
        """Return where an answer behind a prompt begins."""
        detokenizer = self.texts.detokenizer(skip_special_tokens=False)
        return Opening.of(detokenizer.push(prompt_ids[-_OPENING_TOKENS:]) + detokenizer.flush(), self.dialect)
