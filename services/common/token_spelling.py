"""Spelling of tokens in vocabularies, and the text that a token contributes: one rule for edge and executor.

Two kinds of decoder cover language models:

- byte-level: tokens are bytes; the text is their concatenation as UTF-8;
- pieces: tokens are text, except for byte-fallback tokens (`<0xE2>`), of which a run stands for the bytes of a text.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from scalellm.services.common.model_files import shown

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class SpellingError(ValueError):
    """A decoder is of another kind than the two above, or a token is no Unicode text."""


def byte_alphabet() -> Mapping[str, int]:
    """Return GPT-2's spelling of bytes as characters: printable ones as themselves, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(rest)}


def byte_level_bytes(tokens: Iterable[str | None]) -> list[bytes]:
    """Return the bytes of tokens of a byte-level vocabulary; None has none."""
    # The codec of character maps takes half the time of a lookup per character, and a worker waits for this to start.
    alphabet, encode = {ord(char): byte for char, byte in byte_alphabet().items()}, codecs.charmap_encode

    def bytes_of(token: str | None) -> bytes:
        try:
            return encode(token or "", "strict", alphabet)[0]
        except UnicodeEncodeError:  # an added token, which is plain text
            return (token or "").encode("utf-8")

    return list(map(bytes_of, tokens))


@dataclass(frozen=True, slots=True)
class PieceRule:
    """Rules by which a piece decoder turns tokens into text.

    `replaced` is applied to each token; with `drops_first`, Metaspace's habit, the first token loses its replacement
    characters instead. `strip` characters, at most `strip_count`, are taken off the start of the whole text.
    """

    replaced: tuple[tuple[str, str], ...] = ()
    byte_fallback: bool = False
    drops_first: str = ""
    strip: str = ""
    strip_count: int = 0

    def entry(self, token: str | None) -> str | int | None:
        """Return the text of a token, or the byte that it stands for; None has neither."""
        if token is None:
            return None
        for old, new in self.replaced:
            token = token.replace(old, new)
        match = _BYTE_TOKEN.fullmatch(token) if self.byte_fallback else None
        return token if match is None else int(match[1], 16)


def piece_rule(spec: Mapping[str, Any]) -> PieceRule:
    """Return the rule of a decoder, as tokenizer.json describes it. Raises SpellingError."""
    rule = PieceRule()
    fused = False
    for step in spec["decoders"] if spec.get("type") == "Sequence" else [spec]:
        kind = step.get("type")
        if kind == "Replace" and "String" in step["pattern"] and not rule.byte_fallback:
            rule = replace(rule, replaced=(*rule.replaced, (step["pattern"]["String"], step["content"])))
        elif kind == "ByteFallback" and not rule.drops_first:
            rule = replace(rule, byte_fallback=True)
        elif kind == "Metaspace" and rule == PieceRule():
            dropped = "" if step["prepend_scheme"] == "never" else step["replacement"]
            rule = replace(rule, replaced=((step["replacement"], " "),), drops_first=dropped)
        elif kind == "Fuse":
            fused = True
        elif kind == "Strip" and fused and step["stop"] == 0 and not rule.strip_count:
            rule = replace(rule, strip=step["content"], strip_count=step["start"])
        else:
            raise SpellingError(f"decoder {kind!r} is not supported in {shown(spec)}")
    return rule


def token_bytes(tokens: list[str | None], spec: Mapping[str, Any]) -> list[bytes]:
    """Return the bytes of each token, as it contributes them after other tokens.

    Args:
        tokens: The vocabulary's spelling of them, by id.
        spec: Their decoder, as tokenizer.json describes it.

    Raises SpellingError.
    """
    try:
        if spec.get("type") == "ByteLevel":
            return byte_level_bytes(tokens)
        rule = piece_rule(spec)
        entries = map(rule.entry, tokens)
        return [bytes([entry]) if isinstance(entry, int) else (entry or "").encode() for entry in entries]
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
        raise SpellingError(f"the token {shown(error.object)} is no Unicode text") from error
