"""Tokens that prompts are made of, and their text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from scalellm.services.tokenizer.text.loading import load_model_tokenizer
from scalellm.services.tokenizer.text.model_tokenizer import UnsupportedTokenizerError

_LEAST_WORDS = 64


@dataclass(frozen=True)
class Vocabulary:
    """An alphabet of token ids to draw prompts from.

    Attributes:
        alphabet: The ids.
        tokenizer: Makes text of them; None where only ids are sent.
    """

    alphabet: tuple[int, ...]
    tokenizer: Tokenizer | None = None

    @classmethod
    def of_size(cls, vocab_size: int) -> Vocabulary:
        """All ids but the lowest, where vocabularies keep their special tokens."""
        return cls(tuple(range(min(256, vocab_size // 2), vocab_size)))

    @classmethod
    def of_words(cls, path: Path) -> Vocabulary:
        """The words of a tokenizer: tokens of ASCII letters that begin with the space before them.

        Tokenizers do not merge across such a space: a row of these tokens becomes the same tokens again when its text
        is encoded, so servers that take text compute what servers that take ids compute.

        Args:
            path: A model's folder or `.gguf` file, or a `tokenizer.json`.

        Raises ValueError where there is no tokenizer, or one with too few words.
        """
        try:
            model = load_model_tokenizer(path.parent if path.name == "tokenizer.json" else path)
        except UnsupportedTokenizerError as error:
            raise ValueError(f"--tokenizer: {error}") from None
        tokenizer, ids = model.tokenizer, range(model.vocab_size)
        # Twice, because some decoders drop the first space of a text.
        texts = tokenizer.decode_batch([[token_id, token_id] for token_id in ids])
        words = tuple(token_id for token_id, text in zip(ids, texts, strict=True) if _is_word_twice(text))
        if len(words) < _LEAST_WORDS:
            raise ValueError(f"--tokenizer: {path} has {len(words)} words of ASCII letters, fewer than {_LEAST_WORDS}")
        return cls(words, tokenizer)

    def text(self, token_ids: Sequence[int]) -> str:
        """The text of the ids; empty without a tokenizer."""
        return "" if self.tokenizer is None else self.tokenizer.decode(list(token_ids))


def _is_word_twice(text: str) -> bool:
    first, space, second = text.removeprefix(" ").partition(" ")
    return bool(space) and first == second and first.isascii() and first.isalpha()
