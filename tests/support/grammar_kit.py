"""A vocabulary for the tiny model of runner_kit, in which every token but three is a character of ASCII."""

import time
from collections.abc import Iterator, Sequence

from runner_kit import MODEL
from scalellm.services.common.vocabulary import Vocabulary
from scalellm.services.executor.engine.engine import Engine
from scalellm.services.executor.engine.step_result import StepResult
from scalellm.services.executor.grammar import LlGrammarCompiler
from scalellm.services.tokenizer.structure.json_schema import checked_schema

(EOS,) = MODEL.eos_token_ids
_FIRST = 3
VOCABULARY = Vocabulary(
    [b""] * _FIRST + [bytes([0x20 + place]) for place in range(MODEL.vocab_size - _FIRST)], frozenset({0, 1})
)


def make_compiler() -> LlGrammarCompiler:
    return LlGrammarCompiler(VOCABULARY, MODEL.eos_token_ids)


def steps(engine: Engine) -> Iterator[StepResult]:
    """Take an engine's steps until it has nothing left to do."""
    while engine.has_unfinished():
        if engine.only_awaits_grammars:
            time.sleep(1e-3)
        yield engine.step()


def ids_of(text: str) -> list[int]:
    return [ord(char) - 0x20 + _FIRST for char in text]


def text_of(token_ids: Sequence[int]) -> str:
    """The text of an answer, without the token that ended it."""
    return b"".join(VOCABULARY.tokens[token_id] for token_id in token_ids).decode()


def json_grammar(schema: str) -> str:
    return f"start: %json {checked_schema(schema, 'schema')}"
