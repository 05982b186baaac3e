"""The tokens that end an answer: one rule for edge and executor, over the same files.

A sample ends at any token that any of the model's files names as an end, and at any special token whose text is known
to end a turn, because files are incomplete: in a GGUF file, `eos` may end documents, while chats end at `<|im_end|>`.
"""

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from scalellm.services.common.gguf_metadata import GgufMetadata
from scalellm.services.common.gguf_parts import gguf_models
from scalellm.services.common.model_files import read_json_object, shown

_log = logging.getLogger(__name__)

END_TEXTS = frozenset(
    {
        *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|return|>", "<|call|>", "<|end_of_turn|>"),
        *("<end_of_turn>", "<turn|>", "<end_of_utterance>", "<EOT>", "_<EOT>", "[EOT]"),
        *("<|endoftext|>", "<|end_of_text|>", "<eos>", "</s>", "[EOS]", "<｜end▁of▁sentence｜>"),
    }
)
"""Texts of special tokens that end a turn or a document in the vocabularies of published models."""

_END_OF_MESSAGE = "<|end|>"
_ENDS_OF_MESSAGES = frozenset({"<|return|>", "<|call|>"})
"""A vocabulary with both has turns of several messages, in which `<|end|>` ends a message but not the turn."""

GGUF_CONTROL = 3
"""GGUF's type of tokens that are markup rather than text."""

_CONFIG_FILES = ("generation_config.json", "config.json")
_GGUF_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
_Named = tuple[str, Any]
"""An id, and the file and key that name it, for messages."""


def end_token_ids(model: Path, vocab_size: int | None = None) -> tuple[int, ...]:
    """Return the ids that end an answer of `model`, a model directory or a `.gguf` file, ascending.

    An id beyond the vocabulary (the smaller of `vocab_size`, if given, and the size in the files) can never be drawn,
    so it is left out with a warning that names file, key and value. Raises ModelFileError and GgufError.
    """
    ids: set[int] = set()
    for source in (_from_directory(model), _from_gguf(model)):
        size = min((size for size in (source[0], vocab_size) if size is not None), default=None)
        ids.update(token_id for place, value in source[1] if (token_id := drawable(place, value, size)) is not None)
    return tuple(sorted(ids))


def _ends_among(special: Sequence[str]) -> Collection[str]:
    """Return which of these special tokens end a turn or a document, by their texts."""
    ends = END_TEXTS.intersection(special)
    return ends - {_END_OF_MESSAGE} if ends >= _ENDS_OF_MESSAGES else ends


def drawable(place: str, value: object, vocab_size: int | None) -> int | None:
    """Check a token id from a file. Returns it, or None, with a warning that names the `place`, if no token has it."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < (vocab_size or 2**31):
        return value
    known = "" if vocab_size is None else f" of the model's {vocab_size}"
    _log.warning("%s is %s, which is the id of no token%s: it is ignored", place, shown(value), known)
    return None


_Source = tuple[int | None, Sequence[_Named]]
"""The size of the vocabulary, where it is known, and what is named."""


def _from_directory(folder: Path) -> _Source:
    if not folder.is_dir():
        return None, []
    configs = {name: read_json_object(folder / name, missing={}) for name in _CONFIG_FILES}
    named = [entry for name, config in configs.items() for entry in _ids_in(folder / name, config)]
    size = _text_config(configs["config.json"]).get("vocab_size")
    is_size = isinstance(size, int) and not isinstance(size, bool) and size > 0
    return size if is_size else None, [*named, *_from_tokenizer(folder)]


def _ids_in(path: Path, config: Mapping[str, Any]) -> Iterator[_Named]:
    value = _text_config(config).get("eos_token_id")
    for token_id in value if isinstance(value, list) else [value]:
        if token_id is not None:
            yield f"{path}: eos_token_id", token_id


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a configuration about the language model, which is nested in models that also read images."""
    text = config.get("text_config")
    return {**text, **config} if isinstance(text, Mapping) else config


def _from_tokenizer(folder: Path) -> Iterator[_Named]:
    tokenizer = read_json_object(folder / "tokenizer.json", missing={})
    role = read_json_object(folder / "tokenizer_config.json", missing={}).get("eos_token")
    eos = role.get("content") if isinstance(role, Mapping) else role
    entries = tokenizer.get("added_tokens")
    added = [entry for entry in entries if isinstance(entry, Mapping)] if isinstance(entries, list) else []
    special = [entry.get("content") for entry in added if entry.get("special") is True]
    ends = _ends_among([text for text in special if isinstance(text, str)])
    for entry in added:
        text = entry.get("content")
        if isinstance(text, str) and (text == eos or (text in ends and entry.get("special") is True)):
            yield f"{folder / 'tokenizer.json'}: added token {shown(text)}", entry.get("id")
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    if isinstance(eos, str) and isinstance(vocabulary, Mapping) and eos in vocabulary:
        yield f"{folder / 'tokenizer.json'}: {shown(eos)}", vocabulary[eos]


def _from_gguf(model: Path) -> _Source:
    path = _gguf_file(model)
    if path is None:
        return None, []
    metadata = GgufMetadata(path)
    prefix = "tokenizer.ggml."
    named = [(f"{path}: {prefix}{key}", metadata[prefix + key]) for key in _GGUF_KEYS if prefix + key in metadata]
    tokens, types = metadata.array(f"{prefix}tokens", str), metadata.array(f"{prefix}token_type", int)
    if tokens is None:
        return None, named
    if types is not None:
        pairs = enumerate(zip(tokens, types, strict=False))
        special = [(number, text) for number, (text, kind) in pairs if kind == GGUF_CONTROL]
        ends = _ends_among([text for _, text in special])
        known = [number for number, text in special if text in ends]
        named += [(f"{path}: {shown(tokens[number])}", number) for number in known]
    return len(tokens), named


def _gguf_file(model: Path) -> Path | None:
    """Return the GGUF file of a model: the file itself, or the one that a directory's weights or tokenizer are from."""
    if model.is_file():
        return model
    files = gguf_models(model)
    named = [path for path in files if path.name == "model.gguf"]
    return named[0] if named else files[0] if len(files) == 1 else None
