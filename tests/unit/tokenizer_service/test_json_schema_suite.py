"""The JSON Schema Test Suite against what the edge accepts and the executor allows.

A schema is refused by the name of what is not supported, or kept to: nothing invalid is allowed, and what is valid is
allowed unless it stands below with the reason.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from dialect_kit import EOS, make_compiler
from scalellm.services.common.errors import StatusError
from scalellm.services.executor.engine.grammar import GrammarError
from scalellm.services.executor.grammar import LlGrammarCompiler
from scalellm.services.tokenizer.structure.json_schema import checked_schema

SUITE = Path(__file__).resolve().parents[2] / "support" / "json_schema_suite.jsonl"
GROUPS = [json.loads(line) for line in SUITE.read_text(encoding="utf-8").splitlines()]
FILES = sorted({group["file"] for group in GROUPS})
MOST_SPELLINGS = 24

UNSATISFIABLE = "Unsatisfiable schema"
"""Message about a schema to which nothing is valid: it is not one keyword's fault."""

UNUSUAL = "a rare spelling, which nobody misses in an answer"
LEAP_SECOND = "a 60th second is never written: when there is one no pattern can tell"
ASSERTED = "the draft's default takes formats for remarks; here they are kept to, as OpenAI does"
NOT_WRITTEN: Mapping[tuple[str, str], str] = {
    ("format", "is only an annotation by default"): ASSERTED,
    ("format/date-time", "leap second"): LEAP_SECOND,
    ("format/time", "leap second"): LEAP_SECOND,
    ("format/email", "quoted string"): UNUSUAL,
    ("format/email", "IPv6-address-literal"): UNUSUAL,
    ("format/ipv6", "mixed format"): UNUSUAL,
    ("format/ipv6", "a long valid ipv6"): UNUSUAL,
}
"""Valid values that are not allowed: file, part of the description, and why."""

NUM_KEPT_TO = 165
"""Schemas that are kept to. It may grow."""


@pytest.fixture(scope="module")
def compiler() -> Iterator[LlGrammarCompiler]:
    made = make_compiler()
    yield made
    made.close()


def keywords(schema: Any) -> set[str]:
    """All names in a schema."""
    if isinstance(schema, dict):
        return {*schema, *(name for value in schema.values() for name in keywords(value))}
    return {name for value in schema for name in keywords(value)} if isinstance(schema, list) else set()


def spellings(value: Any) -> Iterator[Any]:
    """A value with its properties in other orders, and whole numbers as such: a grammar has one order."""
    if isinstance(value, list):
        yield from map(list, itertools.islice(itertools.product(*map(list, map(spellings, value))), MOST_SPELLINGS))
    elif isinstance(value, dict):
        entries = [[(key, spelled) for spelled in spellings(inner)] for key, inner in value.items()]
        for order in itertools.islice(itertools.permutations(entries), MOST_SPELLINGS):
            yield from map(dict, itertools.islice(itertools.product(*order), MOST_SPELLINGS))
    elif isinstance(value, float) and value.is_integer():
        yield from (int(value), value)
    else:
        yield value


def is_allowed(matcher: Any, value: Any) -> bool:
    for spelled in spellings(value):
        token_ids = [*json.dumps(spelled, ensure_ascii=False).encode(), EOS]
        if matcher.deep_copy().validate_tokens(token_ids) == len(token_ids):
            return True
    return False


def refusal(compiler: LlGrammarCompiler, schema: Any) -> tuple[str, Any]:
    """Return the message that refuses a schema and None, or an empty message and a matcher of the schema."""
    try:
        checked = checked_schema(json.dumps(schema), "schema")
        (matcher,) = compiler.start(f"start: %json {checked}\n", [[]]).matchers()
    except (StatusError, GrammarError) as error:
        return str(error), None
    return "", matcher.matcher


def names_one(message: str, names: Collection[str]) -> bool:
    """True if a message names one of these keywords."""
    # llguidance says "patternProperty", and writes oneOf without quotes.
    said = message.replace("patternProperty", "patternProperties").partition(" 1 | ")[0]
    return any(re.search(rf"(?<![\w$]){re.escape(name)}(?!\w)", said) for name in names)


@pytest.mark.parametrize("file", FILES)
def test_schemas_are_kept_to_or_refused_by_name(compiler: LlGrammarCompiler, file: str) -> None:
    for group in (group for group in GROUPS if group["file"] == file):
        message, matcher = refusal(compiler, group["schema"])
        if message:
            assert names_one(message, keywords(group["schema"])) or UNSATISFIABLE in message, message
            if UNSATISFIABLE in message:
                assert not any(is_valid for _, value, is_valid in group["tests"])
            continue
        for description, value, is_valid in group["tests"]:
            case = f"{group['description']}: {description}"
            allowed = is_allowed(matcher, value)
            assert is_valid or not allowed, case
            if is_valid and not allowed:
                assert any(where == file and part in description for where, part in NOT_WRITTEN), case


def test_reasons_are_of_what_is_so(compiler: LlGrammarCompiler) -> None:
    seen, num_kept_to = set(), 0
    for group in GROUPS:
        message, matcher = refusal(compiler, group["schema"])
        num_kept_to += not message
        for description, value, is_valid in [] if message else group["tests"]:
            if is_valid and group["file"].startswith("format") and not is_allowed(matcher, value):
                seen |= {key for key in NOT_WRITTEN if key[0] == group["file"] and key[1] in description}
    assert seen == NOT_WRITTEN.keys()
    assert num_kept_to >= NUM_KEPT_TO


@pytest.mark.parametrize("value", [[], {}, 1, None])
def test_a_format_that_is_no_text_is_refused(value: Any) -> None:
    with pytest.raises(StatusError, match="has the format"):
        checked_schema(json.dumps({"format": value}), "schema")
