"""Shapes of answers for engines without a model; their texts are checked by others than the grammars' library."""

from __future__ import annotations

import contextlib
import functools
import json
import random
import re
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from typing import Any

import jsonschema
import numpy as np

from scalellm.services.common.vocabulary import Vocabulary
from scalellm.services.executor.engine import GrammarError
from scalellm.services.executor.grammar import LlGrammarCompiler
from scalellm.services.tokenizer.structure.json_schema import checked_schema

SIZE = 1000
EOS = 0


def _vocabulary() -> Vocabulary:
    """The end token, each character of ASCII that can be printed, and pieces of two to four of them."""
    rng = random.Random(1)
    letters = [chr(code) for code in range(0x20, 0x7F)]
    likely = letters + list('{}[]":,0123456789tfn') * 6
    pieces: dict[str, None] = dict.fromkeys(['{"', '": ', '", "', "},", "true", "false", "null", '": [', "10"])
    while len(pieces) < SIZE - 1 - len(letters):
        pieces["".join(rng.choices(likely, k=rng.randint(2, 4)))] = None
    return Vocabulary([b"", *(text.encode() for text in (*letters, *pieces))], frozenset({EOS}))


VOCABULARY = _vocabulary()


def text_of(token_ids: Sequence[int]) -> str:
    """The text of an answer; its end token is none."""
    return b"".join(VOCABULARY.tokens[token_id] for token_id in token_ids).decode()


def json_grammar(schema: Any) -> str:
    """The grammar that the edge makes of a schema."""
    return f"start: %json {checked_schema(json.dumps(schema), 'schema')}"


def _fits(schema: Any, text: str) -> bool:
    jsonschema.validate(json.loads(text), schema)
    return True


_SCHEMAS: tuple[Any, ...] = (
    {
        "type": "object",
        "required": ["id", "tags", "ok"],
        "additionalProperties": False,
        "properties": {
            "id": {"type": "integer", "minimum": -9, "maximum": 9999},
            "tags": {"type": "array", "maxItems": 3, "items": {"enum": ["a", "bc", 10, None]}},
            "ok": {"type": "boolean"},
        },
    },
    {"type": "array", "minItems": 4, "maxItems": 6, "items": {"type": "string", "pattern": "^[a-f]{2,4}$"}},
    {
        "$ref": "#/$defs/tree",
        "$defs": {
            "tree": {
                "type": "object",
                "additionalProperties": False,
                "required": ["v"],
                "properties": {"v": {"type": "boolean"}, "n": {"$ref": "#/$defs/tree"}},
            }
        },
    },
)
CHECKS: dict[str, Callable[[str], Any]] = {
    **{json_grammar(schema): functools.partial(_fits, schema) for schema in _SCHEMAS},
    r"start: /[a-c]+[0-9]{12,25}/": re.compile(r"[a-c]+[0-9]{12,25}").fullmatch,
    'start: "yes" | "no" | "not at all"': ("yes", "no", "not at all").__contains__,
    'start: "(" start ")" | "x"': lambda text: text.count("(") == text.count(")") and text.strip("()") == "x",
}
"""Checks of a text's shape, by grammar."""

GRAMMARS = tuple(CHECKS)


@functools.cache
def compiler() -> LlGrammarCompiler:
    """Return the compiler of all engines of a test process."""
    return LlGrammarCompiler(VOCABULARY, {EOS})


class _AtOnce(Executor):
    """Runs what is submitted before `submit` returns."""

    def submit(self, run: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run it; the future is done."""
        future = Future[Any]()
        try:
            future.set_result(run(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)
        return future


@functools.cache
def compiler_of_masks_at_once() -> LlGrammarCompiler:
    """Return the compiler of all engines on virtual time, whose masks are never waited for: what happens would follow
    from how fast their thread is.
    """
    found = LlGrammarCompiler(VOCABULARY, {EOS})
    found._mask_thread = _AtOnce()  # type: ignore[assignment]
    return found


class CompilesAtOnce:
    """A compiler that is done when `start` returns: on virtual time nobody waits for a thread."""

    def __init__(self, find: Callable[[], LlGrammarCompiler] = compiler) -> None:
        self._find = find

    def start(self, grammar: str, outputs: Sequence[Sequence[int]]) -> Any:
        """Make the matchers."""
        compilation = self._find().start(grammar, outputs)
        with contextlib.suppress(GrammarError):  # it is raised again where the matchers are taken
            compilation.matchers()
        return compilation


def problem(grammar: str, token_ids: Sequence[int], max_tokens: int) -> str:
    """Describe the problem of a sample's whole answer; empty if it is complete and valid, or as long as allowed."""
    text = text_of(token_ids)
    if not token_ids or token_ids[-1] != EOS:
        return "" if len(token_ids) == max_tokens else f"{text!r} has no end and {len(token_ids)} tokens"
    try:
        return "" if CHECKS[grammar](text) else f"{text!r} has another shape"
    except (ValueError, jsonschema.ValidationError) as error:
        return f"{text!r}: {error}"


def shaped_tokens(grammar: str, number: Callable[[int, int], int], previous: int, max_tokens: int) -> list[int]:
    """The tokens that a sample has alone: of those that its grammar allows at each place the one with a number.

    Args:
        grammar: of the sample.
        number: Says it, modulo how many are allowed, by the place among the outputs and the token before.
        previous: The last token of the prompt.
        max_tokens: It ends with them.
    """
    (matcher,) = compiler().start(grammar, [()]).matchers()
    found = [previous]
    while len(found) <= max_tokens and (found[-1] != EOS or len(found) == 1):
        mask = np.frombuffer(matcher.matcher.compute_bitmask(), np.uint8)
        allowed = np.flatnonzero(np.unpackbits(mask, count=SIZE, bitorder="little"))
        found.append(int(allowed[number(len(found) - 1, found[-1]) % len(allowed)]))
        matcher.follow(found[1:])
    return found[1:]
