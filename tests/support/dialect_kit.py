"""A vocabulary in which every dialect can be written, and answers drawn at random from a grammar."""

from __future__ import annotations

import random
from collections.abc import Sequence

from scalellm.services.common.vocabulary import Vocabulary
from scalellm.services.executor.grammar import LlGrammarCompiler
from scalellm.services.tokenizer.dialect import Dialect, Part
from scalellm.services.tokenizer.dialect.constraint import AnswerGrammar
from scalellm.services.tokenizer.dialect.splitter import Opening, make_splitter

SPECIAL = (
    *("<eos>", "[TOOL_CALLS]", "[ARGS]", "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
    *("<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"),
    *("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
    *("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"),
    *("<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|end|>", "<|call|>", "<|return|>"),
)
ADDED = ("<think>", "</think>", "[THINK]", "[/THINK]", "<tool_call>", "</tool_call>")
"""Tokens of their own that are no special ones, as Qwen's are."""

_NUM_BYTES = 256
_TEXTS = [*SPECIAL, *ADDED]
_CLOSING = frozenset(b'"}]>\n') | frozenset(range(_NUM_BYTES, _NUM_BYTES + len(_TEXTS)))
"""Tokens that lead to an end sooner or later."""

SPECIAL_IDS = {text: _NUM_BYTES + place for place, text in enumerate(SPECIAL)}
ADDED_IDS = {text: _NUM_BYTES + place for place, text in enumerate(_TEXTS)}
EOS = SPECIAL_IDS["<eos>"]
VOCABULARY = Vocabulary(
    [bytes([byte]) for byte in range(_NUM_BYTES)] + [text.encode() for text in _TEXTS], frozenset(SPECIAL_IDS.values())
)


def make_compiler() -> LlGrammarCompiler:
    return LlGrammarCompiler(VOCABULARY, [EOS])


def answer_grammar(dialect: Dialect) -> AnswerGrammar:
    return AnswerGrammar(dialect, SPECIAL_IDS, ADDED_IDS, [EOS])


def ids_of(text: str) -> list[int]:
    """Tokens of a text: those of marks, and bytes between them."""
    token_ids: list[int] = []
    while text:
        mark = max(filter(text.startswith, _TEXTS), key=len, default="")
        token_ids += [ADDED_IDS[mark]] if mark else text[0].encode()
        text = text[len(mark) or 1 :]
    return token_ids


def text_of(token_ids: Sequence[int]) -> str:
    """The text of an answer, without the token that ended it."""
    return b"".join(VOCABULARY.tokens[token_id] for token_id in token_ids if token_id != EOS).decode(errors="replace")


def accepts(compiler: LlGrammarCompiler, grammar: str, text: str) -> bool:
    """Return whether a text is a complete answer."""
    (matcher,) = compiler.start(grammar, [[]]).matchers()
    for token_id in [*ids_of(text), EOS]:
        if not _allowed(matcher.matcher.compute_bitmask(), token_id):
            return False
        matcher.matcher.consume_token(token_id)
    return True


def draw(compiler: LlGrammarCompiler, grammar: str, chance: random.Random, most: int = 4000) -> str:
    """Return a complete answer, of which each token was drawn from all that the grammar allows there.

    Most texts are ASCII, and an answer ends once it may, more often than not: or it would be endless.
    """
    (matcher,) = compiler.start(grammar, [[]]).matchers()
    token_ids: list[int] = []
    while len(token_ids) < most:
        mask = matcher.matcher.compute_bitmask()
        allowed = [token_id for token_id in range(len(VOCABULARY.tokens)) if _allowed(mask, token_id)]
        closing = [token_id for token_id in allowed if token_id in _CLOSING]
        token_id = chance.choice(closing if closing and chance.random() < 0.6 else allowed)
        if EOS in allowed and chance.random() < 0.3:
            token_id = EOS
        matcher.matcher.consume_token(token_id)
        if token_id == EOS:
            return text_of(token_ids)
        token_ids.append(token_id)
    raise AssertionError(f"no end after {most} tokens: {text_of(token_ids)[:500]}")


def split(
    dialect: Dialect,
    pieces: Sequence[str],
    opening: Opening = Opening.ANYWHERE,
    *,
    has_calls: bool = True,
    texts: dict[str, dict[str, bool]] | None = None,
) -> list[Part]:
    """Return the parts of an answer that comes in pieces, those put together that are more of the same."""
    splitter = make_splitter(
        dialect,
        opening,
        has_calls=has_calls,
        make_id=lambda number: f"id{number}",
        texts_of=lambda name: (texts or {}).get(name, {}),
    )
    parts: list[Part] = []
    for part in (*(part for piece in pieces for part in splitter.push(piece)), *splitter.flush()):
        last = parts[-1] if parts else None
        if last is not None and last.kind is part.kind and not part.call_id and last.number == part.number:
            parts[-1] = last._replace(text=last.text + part.text)
        else:
            parts.append(part)
    return parts


def told(parts: Sequence[Part]) -> list[tuple[str, str]]:
    """Return the name of each part, of one without a name its kind, and its text."""
    return [(part.name or part.kind.name.lower(), part.text) for part in parts]


def _allowed(mask: bytes, token_id: int) -> bool:
    return bool(mask[token_id // 8] >> (token_id % 8) & 1)
