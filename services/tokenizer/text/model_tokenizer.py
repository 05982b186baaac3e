"""The text side of a model's directory or file: tokenizer, special tokens, chat template."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from tokenizers import Tokenizer

from scalellm.services.common.model_files import brief

_T = TypeVar("_T")


class UnsupportedTokenizerError(Exception):
    """The model's tokenizer cannot be used; the message is one sentence that names the model and the reason."""


def from_library(make: Callable[[], _T], refusal: str) -> _T:
    """Return what the `tokenizers` library makes. Raises UnsupportedTokenizerError, with the refusal and its reason."""
    try:
        return make()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # it raises bare Exception, and a panic of Rust is not even one
        raise UnsupportedTokenizerError(f"{refusal}: {brief(error)}") from error


@dataclass(frozen=True)
class ModelTokenizer:
    """A model's tokenizer and its surroundings. Immutable: the tokenizer may be shared by threads.

    Attributes:
        tokenizer: Without truncation or padding. Encoding with special tokens applies the model's own rule (usually a
            beginning-of-sequence token in front).
        sha256: Digest of the source (scalellm.services.common.tokenizer_digest), 32 bytes.
        eos_token_ids: Tokens that end an answer, ascending.
        special_tokens: Texts of the tokens with a role, by the name that chat templates use (`bos_token`, ...).
        chat_templates: Jinja source by template name; "default" is the one for plain chat. Empty for a base model.
    """

    tokenizer: Tokenizer
    sha256: bytes
    eos_token_ids: tuple[int, ...]
    special_tokens: Mapping[str, str]
    chat_templates: Mapping[str, str]

    @property
    def chat_template(self) -> str | None:
        """The template for plain chat."""
        return self.chat_templates.get("default")

    @cached_property
    def vocab_size(self) -> int:
        """Number of token ids, added tokens included: every id is below it."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @cached_property
    def special_token_ids(self) -> frozenset[int]:
        """Tokens that are markup rather than text: left out by `skip_special_tokens`."""
        added = self.tokenizer.get_added_tokens_decoder()
        return frozenset(token_id for token_id, token in added.items() if token.special)
