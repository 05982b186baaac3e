"""A model's output format: the texts of its tokens, and the marks of reasoning and calls among them."""

from __future__ import annotations

from collections.abc import Sequence

from scalellm.services.tokenizer.dialect import dialect_of
from scalellm.services.tokenizer.dialect.opening import Opening
from scalellm.services.tokenizer.text.detokenizer import TokenTexts
from scalellm.services.tokenizer.text.model_tokenizer import ModelTokenizer

_OPENING_TOKENS = 16
"""Number of a prompt's last tokens that are examined, enough for a mark of reasoning at its end."""


class Writing:
    """One model's output format. Immutable.

    Args:
        model: The model's tokenizer.

    Attributes:
        texts: Texts of the model's tokens.
        marked_texts: The same, with marks never left out, for answers in which reasoning and calls are told apart.
        dialect: The format of reasoning and calls.
        added_ids: Added tokens, special or not, by their texts. They are split off a text before it is encoded.
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
        """Return the part in which the answer to a prompt begins."""
        detokenizer = self.texts.detokenizer(skip_special_tokens=False)
        return Opening.of(detokenizer.push(prompt_ids[-_OPENING_TOKENS:]) + detokenizer.flush(), self.dialect)
