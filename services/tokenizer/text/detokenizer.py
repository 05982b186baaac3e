"""Incremental conversion of token ids to text. The deltas and the result of `flush` add up to decoding all ids at once.

`tokenizers.decoders.DecodeStream` does not guarantee that: it has no flush, so pending text at the end is lost; it
takes every U+FFFD at the end of a text for an incomplete character, so after invalid bytes it returns nothing and
decodes an ever longer tail again with every token; and it raises on some byte-fallback sequences. So the decoder is
implemented here, with a table of the text of each token. The cost of a token does not depend on the length of the text.

Two kinds of decoder cover language models:

- byte-level: tokens are bytes, and the text is their concatenation as UTF-8; - pieces: tokens are text, except for
byte-fallback tokens (`<0xE2>`), consecutive ones of which are the bytes of a text.
"""

import codecs
import copy
import json
from collections.abc import Collection, Sequence
from typing import Any, Protocol, Self

from tokenizers import Tokenizer

from scalellm.services.common.token_spelling import (
    PieceRule,
    SpellingError,
    byte_level_bytes,
    piece_rule,
)
from scalellm.services.tokenizer.text.model_tokenizer import UnsupportedTokenizerError

_UTF8_DECODER = codecs.getincrementaldecoder("utf-8")
_LONGEST_CHARACTER = 4  # bytes of UTF-8


class Detokenizer(Protocol):
    """Turns one sample's tokens into text. Not safe for concurrent use."""

    def push(self, token_ids: Sequence[int]) -> str:
        """Add tokens. Returns the text that has become certain, which may be empty."""

    def flush(self) -> str:
        """Return the rest, with U+FFFD for incomplete characters. No call may follow."""

    def copy(self) -> Self:
        """Return an independent detokenizer in the same state."""

    @property
    def is_complete(self) -> bool:
        """True if all text is certain so far: `flush` would return nothing."""


class TokenTexts:
    """The text that each token of a vocabulary contributes. Built once per tokenizer; immutable.

    The detokenizers are for texts that begin with their first token, unless `after` was used.

    Attributes:
        tokens: The vocabulary's spelling of each token, by id.
        special_ids: Ids of the special tokens, by their texts.

    Raises UnsupportedTokenizerError for a decoder of another kind than the two above.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        state = tokenizer.decoder.__getstate__() if tokenizer.decoder is not None else b"{}"
        spec: dict[str, Any] = json.loads(state)
        self._preceding: Sequence[int] = ()
        self._begun: dict[bool, Detokenizer] = {}
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        tokens: list[str | None] = [None] * (max(vocabulary.values(), default=-1) + 1)
        for token, token_id in vocabulary.items():
            tokens[token_id] = token
        added = tokenizer.get_added_tokens_decoder()
        for token_id, added_token in added.items():  # an added token takes precedence over another token with its id
            tokens[token_id] = added_token.content
        self.tokens = [token or "" for token in tokens]
        self.special_ids = {token.content: token_id for token_id, token in added.items() if token.special}
        visible = [None if token in self.special_ids else token for token in tokens]
        if spec.get("type") == "ByteLevel":
            every = byte_level_bytes(tokens)
            shown = [b"" if token is None else data for token, data in zip(visible, every, strict=True)]
            self._bytes: tuple[list[bytes], list[bytes]] | None = every, shown
        else:
            self._bytes = None
            try:
                rule = piece_rule(spec)
            except SpellingError as error:
                raise UnsupportedTokenizerError(f"tokenizer {error}") from None
            self._pieces = (_PieceTable(tokens, rule), _PieceTable(visible, rule))

    def after(self, token_ids: Sequence[int]) -> "TokenTexts":
        """Return the same for texts that continue a prompt, whose first token does not begin a text.

        An answer is `decode(prompt + answer)[len(decode(prompt)):]`, so decoders that remove a space at the start of a
        text keep one at the start of the answer. A character that the prompt begins and the answer completes, which the
        formula would cut, is shown as a whole.
        """
        continued = copy.copy(self)
        continued._preceding, continued._begun = token_ids, {}
        return continued

    def showing(self, token_ids: Collection[int]) -> "TokenTexts":
        """Return the same, with these special tokens never left out."""
        if not token_ids:
            return self
        shown = copy.copy(self)
        shown._begun = {}
        if self._bytes is not None:
            every, visible = self._bytes
            shown._bytes = every, [every[at] if at in token_ids else data for at, data in enumerate(visible)]
        else:
            whole, part = self._pieces
            shown._pieces = whole, part.showing(whole, token_ids)
        return shown

    def bytes_of(self, token_id: int) -> bytes:
        """Return the bytes of a token that follows others. For a special token these are its text."""
        if self._bytes is not None:
            table = self._bytes[0]
            return table[token_id] if token_id < len(table) else b""
        entries = self._pieces[0].entries
        entry = entries[token_id] if token_id < len(entries) else None
        return bytes([entry]) if isinstance(entry, int) else (entry or "").encode()

    def detokenizer(self, *, skip_special_tokens: bool = True) -> Detokenizer:
        """Return a detokenizer for a new text. What precedes the text is read once for all detokenizers of a kind,
        because a prompt without visible text is read as a whole.
        """
        begun = self._begun.get(skip_special_tokens)
        if begun is None:
            begun = self._begun[skip_special_tokens] = self._begin(skip_special_tokens=skip_special_tokens)
        return begun.copy()

    def _begin(self, *, skip_special_tokens: bool) -> Detokenizer:
        detokenizer: Detokenizer
        if self._bytes is not None:
            detokenizer = _ByteLevelDetokenizer(self._bytes[skip_special_tokens], self._preceding)
        else:
            detokenizer = _PieceDetokenizer(self._pieces[skip_special_tokens], self._preceding)
        if not detokenizer.is_complete and (pending := detokenizer.copy().flush()):
            return _AfterIncompleteCharacter(detokenizer, pending)
        return detokenizer


class _AfterIncompleteCharacter:
    """Detokenizer of a text that continues bytes of a possibly incomplete character. The text before them ends in
    `shown`.
    """

    def __init__(self, detokenizer: Detokenizer, shown: str) -> None:
        self._detokenizer = detokenizer
        self._shown = shown

    def push(self, token_ids: Sequence[int]) -> str:
        return self._cut(self._detokenizer.push(token_ids))

    def flush(self) -> str:
        return self._cut(self._detokenizer.flush())

    def copy(self) -> "_AfterIncompleteCharacter":
        return _AfterIncompleteCharacter(self._detokenizer.copy(), self._shown)

    @property
    def is_complete(self) -> bool:
        return self._detokenizer.is_complete

    def _cut(self, text: str) -> str:
        # The first new text contains the whole character, of which nothing was shown before.
        if text and self._shown:
            is_complete = self._shown.startswith("\ufffd") and not text.startswith(self._shown)
            text, self._shown = text if is_complete else text[len(self._shown) :], ""
        return text


class _ByteLevelDetokenizer:
    def __init__(self, table: list[bytes], preceding: Sequence[int] = ()) -> None:
        self._table = table
        self._utf8 = _UTF8_DECODER("replace")
        if preceding:
            self._utf8.decode(self._last_bytes(preceding))

    def push(self, token_ids: Sequence[int]) -> str:
        table = self._table
        try:
            data = b"".join([table[token_id] for token_id in token_ids])
        except IndexError:  # an id beyond the vocabulary, which a padded output layer may produce, has no text
            data = b"".join([table[token_id] for token_id in token_ids if token_id < len(table)])
        return self._utf8.decode(data)

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)

    def copy(self) -> "_ByteLevelDetokenizer":
        twin = _ByteLevelDetokenizer(self._table)
        twin._utf8.setstate(self._utf8.getstate())
        return twin

    @property
    def is_complete(self) -> bool:
        return not self._utf8.getstate()[0]

    def _last_bytes(self, token_ids: Sequence[int]) -> bytes:
        """Return at least as many of the last bytes as a character may have, so that they contain its first byte."""
        table, last = self._table, b""
        for token_id in reversed(token_ids):
            last = (table[token_id] if token_id < len(table) else b"") + last
            if len(last) >= _LONGEST_CHARACTER:
                break
        return last


class _PieceTable:
    """Table by token id: its text, its byte, or None for no text."""

    def __init__(self, tokens: list[str | None], rule: PieceRule) -> None:
        self.rule = rule
        self.entries = [rule.entry(token) for token in tokens]
        self.first: list[str | None] = (
            [token and token.replace(rule.drops_first, "") for token in tokens] if rule.drops_first else []
        )

    def showing(self, whole: "_PieceTable", token_ids: Collection[int]) -> "_PieceTable":
        """Return this table, with the entries of some tokens taken from a complete table."""
        shown = copy.copy(self)
        shown.entries, shown.first = list(self.entries), list(self.first)
        for token_id in token_ids:
            shown.entries[token_id] = whole.entries[token_id]
            if shown.first:
                shown.first[token_id] = whole.first[token_id]
        return shown


class _PieceDetokenizer:
    def __init__(self, table: _PieceTable, preceding: Sequence[int] = ()) -> None:
        self._table = table
        self._run = bytearray()
        self._first = bool(table.first)
        self._to_strip = table.rule.strip_count
        if preceding:
            self._go_on_after(preceding)

    def push(self, token_ids: Sequence[int]) -> str:
        entries, run = self._table.entries, self._run
        texts: list[str] = []
        for token_id in token_ids:
            entry = entries[token_id] if token_id < len(entries) else None
            if entry is None:
                continue
            if isinstance(entry, int):
                run.append(entry)
                continue
            if run:
                texts.append(self._end_run())
            if self._first:
                self._first = False
                entry = self._table.first[token_id] or ""
            texts.append(entry)
        return self._strip("".join(texts))

    def flush(self) -> str:
        return self._strip(self._end_run())

    def copy(self) -> "_PieceDetokenizer":
        twin = _PieceDetokenizer(self._table)
        twin._run = bytearray(self._run)
        twin._first, twin._to_strip = self._first, self._to_strip
        return twin

    @property
    def is_complete(self) -> bool:
        return not self._run

    def _go_on_after(self, token_ids: Sequence[int]) -> None:
        """Set the state after a prompt's tokens: whether a text has begun, and the bytes of a run at the
        prompt's end.
        """
        entries = self._table.entries
        count = 0
        while count < len(token_ids) and (self._first or self._to_strip):  # until some text was kept
            start, count = count, self._after_text(token_ids, count)
            self.push(token_ids[start:count])
        last: list[int] = []
        for index in range(len(token_ids) - 1, count - 1, -1):
            token_id = token_ids[index]
            entry = entries[token_id] if token_id < len(entries) else None
            if isinstance(entry, str):
                break
            if entry is not None:
                last.append(entry)
        self._run += bytes(reversed(last))

    def _after_text(self, token_ids: Sequence[int], start: int) -> int:
        """Return the index after the next token whose piece is text that can be seen, or the number of tokens."""
        entries = self._table.entries
        num_entries = len(entries)
        for index in range(start, len(token_ids)):
            token_id = token_ids[index]
            if token_id < num_entries and (entry := entries[token_id]) and isinstance(entry, str):
                return index + 1
        return len(token_ids)

    def _end_run(self) -> str:
        # One invalid byte turns every byte of a run into U+FFFD, so no text of a run is certain before its end.
        try:
            text = self._run.decode("utf-8")
        except UnicodeDecodeError:
            text = "\ufffd" * len(self._run)
        self._run.clear()
        return text

    def _strip(self, text: str) -> str:
        if not self._to_strip or not text:
            return text
        strip = self._table.rule.strip
        count = 0
        while count < min(self._to_strip, len(text)) and text[count] == strip:
            count += 1
        self._to_strip = self._to_strip - count if count == len(text) else 0
        return text[count:]
