"""A lower bound of a text's number of tokens, without encoding it."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Iterator
from typing import Any, Literal

from tokenizers import Tokenizer

from scalellm.services.common.token_spelling import byte_alphabet

_SPACE_MARK = "▁"
_BYTES = range(256)
_ASCII_SPACES = frozenset(b"\t\n\v\f\r\x1c\x1d\x1e\x1f ")


class TokenBound:
    """Computes a lower bound of a text's number of tokens.

    A token that contains a byte has at most as many bytes as the longest token with that byte. So the sum of the
    reciprocals of these lengths over the bytes of a text is at most its number of tokens; for instance, a digit that is
    always a token of its own counts as one. This takes some milliseconds per MiB, while encoding takes seconds.

    The bound requires a tokenizer that keeps every byte of a text. For other tokenizers it is 0, and bytes that may be
    dropped or fused count as 0.

    Args:
        tokenizer: The tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._form: Literal["NFC", "NFKC"] | None = None
        self._added: re.Pattern[str] | None = None
        self._bytes_by_length: list[tuple[int, bytes]] = []
        if not _keeps_text(tokenizer):
            return
        for step in _steps(tokenizer.normalizer, "normalizers"):
            if step["type"] in ("NFC", "NFKC"):
                self._form = step["type"]
        contents = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
        if self._form is not None and contents:
            self._added = re.compile("|".join(map(re.escape, sorted(contents, key=len, reverse=True))))
        by_length: dict[int, list[int]] = {}
        for byte, length in _longest(tokenizer).items():
            by_length.setdefault(length, []).append(byte)
        self._bytes_by_length = [(length, bytes(group)) for length, group in sorted(by_length.items())]

    def at_least(self, text: str) -> int:
        """Return a lower bound of the number of tokens of `text`; 0 if none is known."""
        if self._form is not None and not unicodedata.is_normalized(self._form, text):
            # Added tokens are split off first, because they are never merged with their neighbours.
            parts = self._added.split(text) if self._added is not None else [text]
            return sum(self._count(unicodedata.normalize(self._form, part)) for part in parts)
        return self._count(text)

    def _count(self, text: str) -> int:
        data = text.encode()
        total = sum((len(data) - len(data.translate(None, group))) / length for length, group in self._bytes_by_length)
        return math.ceil(total - 1e-6)


def _keeps_text(tokenizer: Tokenizer) -> bool:
    model = tokenizer.model
    if getattr(model, "continuing_subword_prefix", None) or getattr(model, "end_of_word_suffix", None):
        return False
    if type(model).__name__ not in ("BPE", "Unigram"):
        return False
    added = tokenizer.get_added_tokens_decoder().values()
    for step in _steps(tokenizer.normalizer, "normalizers"):
        is_mark = step["type"] == "Replace" and (step["pattern"], step["content"]) == ({"String": " "}, _SPACE_MARK)
        if not is_mark and step["type"] not in ("NFC", "NFKC", "Prepend"):
            return False
        if step["type"] in ("NFC", "NFKC") and any(token.normalized for token in added):
            return False  # these are cut out of a text that is not known yet
    for step in _steps(tokenizer.pre_tokenizer, "pretokenizers"):
        if step["type"] not in ("ByteLevel", "Metaspace", "Split", "Digits") or step.get("behavior") == "Removed":
            return False
        if step.get("replacement", _SPACE_MARK) != _SPACE_MARK:
            return False
    return True


def _steps(part: Any, name: str) -> list[dict[str, Any]]:
    """Return the steps of a normalizer or a pre-tokenizer."""
    if part is None:
        return []
    spec = json.loads(part.__getstate__())
    return list(spec[name]) if spec["type"] == "Sequence" else [spec]


def _longest(tokenizer: Tokenizer) -> dict[int, int]:
    """Return the length in bytes of the longest token with each byte, for the bytes that always become tokens."""
    is_byte_level = any(step["type"] == "ByteLevel" for step in _steps(tokenizer.pre_tokenizer, "pretokenizers"))
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    added = list(tokenizer.get_added_tokens_decoder().values())
    kept = set(_byte_level_bytes(vocabulary) if is_byte_level else _piece_bytes(tokenizer, vocabulary))
    if any(token.lstrip or token.rstrip for token in added):  # these take any amount of white space along
        kept = {byte for byte in kept if byte < 0x80} - _ASCII_SPACES
    spellings = _byte_level_tokens(vocabulary) if is_byte_level else (token.encode() for token in vocabulary)
    mark = _SPACE_MARK.encode()
    contents = [token.content for token in added]
    contents += [content.replace(" ", _SPACE_MARK) for content in contents if " " in content]
    longest = dict.fromkeys(kept, 1)  # a byte that is in no longer token
    missing = set(kept)
    for data in sorted([*spellings, *(content.encode() for content in contents)], key=len, reverse=True):
        found = missing.intersection(data)
        if not is_byte_level and ord(" ") in missing and mark in data:
            found.add(ord(" "))
        if found:
            longest.update(dict.fromkeys(found, len(data)))
            missing -= found
    return longest


def _byte_level_bytes(vocabulary: dict[str, int]) -> Iterator[int]:
    alphabet = byte_alphabet()
    return (byte for char, byte in alphabet.items() if char in vocabulary)


def _byte_level_tokens(vocabulary: dict[str, int]) -> Iterator[bytes]:
    # One character per byte: the spelling need not be undone for a length, only for the bytes.
    alphabet = byte_alphabet()
    return (bytes([alphabet[char] for char in token if char in alphabet]) for token in vocabulary)


def _piece_bytes(tokenizer: Tokenizer, vocabulary: dict[str, int]) -> Iterator[int]:
    falls_back = bool(getattr(tokenizer.model, "byte_fallback", False))
    falls_back = falls_back and all(f"<0x{byte:02X}>" in vocabulary for byte in _BYTES)
    for byte in _BYTES:
        char = _SPACE_MARK if byte == ord(" ") else chr(byte)
        if falls_back or (byte < 0x80 and char in vocabulary):
            yield byte
