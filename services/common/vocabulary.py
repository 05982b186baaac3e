"""The vocabulary of a model: the bytes of each token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from scalellm.services.common.end_tokens import GGUF_CONTROL
from scalellm.services.common.gguf_metadata import GgufError, GgufMetadata
from scalellm.services.common.model_files import ModelFileError, read_json_object, shown
from scalellm.services.common.token_spelling import SpellingError, token_bytes
from scalellm.services.common.tokenizer_digest import TOKENIZER_JSON, TokenizerSourceError, tokenizer_source

_SENTENCE_PIECE: Mapping[str, Any] = MappingProxyType(
    {
        "type": "Sequence",
        "decoders": (
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
        ),
    }
)
_GGUF_DECODERS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {"gpt2": MappingProxyType({"type": "ByteLevel"}), "llama": _SENTENCE_PIECE}
)


class VocabularyError(ValueError):
    """A model's vocabulary cannot be read; the message is one sentence that names the file and the reason."""


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id. `tokens` are the bytes of each, empty for an unknown id; `special_ids` are tokens without text."""

    tokens: list[bytes]
    special_ids: frozenset[int]


def read_vocabulary(model: Path, vocab_size: int) -> Vocabulary:
    """Read the vocabulary of `model`, a model directory or a `.gguf` file, whose model has `vocab_size` tokens.

    Tokens beyond the model's vocabulary are left out; ids that the tokenizer lacks have no bytes. Raises
    VocabularyError.
    """
    try:
        source = tokenizer_source(model)
        read = _of_tokenizer_json if source.name == TOKENIZER_JSON else _of_gguf
        return read(source, vocab_size)
    except SpellingError as error:
        raise VocabularyError(f"{source}: {error}") from error
    except (TokenizerSourceError, ModelFileError, GgufError) as error:
        raise VocabularyError(str(error)) from error


def _of_tokenizer_json(path: Path, vocab_size: int) -> Vocabulary:
    spec = read_json_object(path)
    try:
        listed = spec["model"]["vocab"]
        pairs = listed.items() if isinstance(listed, dict) else ((entry[0], at) for at, entry in enumerate(listed))
        texts = {token_id: text for text, token_id in pairs}
        added = spec.get("added_tokens") or ()
        texts |= {token["id"]: token["content"] for token in added}
        special = frozenset(token["id"] for token in added if token.get("special") and token["id"] < vocab_size)
        tokens = [texts.get(token_id) for token_id in range(vocab_size)]
        return Vocabulary(token_bytes(tokens, spec.get("decoder") or {}), special)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise VocabularyError(f"{path}: not a tokenizer: {error!r}") from error


def _of_gguf(path: Path, vocab_size: int) -> Vocabulary:
    metadata = GgufMetadata(path)
    family = metadata.typed("tokenizer.ggml.model", str)
    tokens = metadata.array("tokenizer.ggml.tokens", str)
    if tokens is None or family is None or family not in _GGUF_DECODERS:
        raise VocabularyError(f"{path} has a tokenizer of type {shown(family)}, which is not supported")
    types = metadata.array("tokenizer.ggml.token_type", int) or []
    special = frozenset(token_id for token_id, kind in enumerate(types[:vocab_size]) if kind == GGUF_CONTROL)
    texts = [*tokens[:vocab_size], *[None] * (vocab_size - len(tokens))]
    return Vocabulary(token_bytes(texts, _GGUF_DECODERS[family]), special)
