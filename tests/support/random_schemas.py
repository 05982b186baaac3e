"""Random JSON Schemas of the supported keywords, expressions and choices; what says if a text has such a shape."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from typing import Any

import jsonschema
import regex
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from scalellm.services.tokenizer.structure import grammar_of
from scalellm.services.tokenizer.structure.json_schema import FORMATS
from scalellm.v1 import generation_pb2

PATTERNS = (
    *("^[a-z]{2,5}$", "^(red|green|blue)( (light|dark))?$", r"^\d{3}-\d{4}$", "[0-9]+$", "^x", r"^[^\s]{1,6}$"),
    *("^(ab|a)*c{2}$", r"^\p{Lu}\p{Ll}{2}$", "^[é-ü]{1,3}$", "^(?:[0-9a-f]{2}:){2}[0-9a-f]{2}$"),
)
_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**6), 10**6),
    # SmolLM2 cannot write all characters of four bytes.
    st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7FF), max_size=8),
)


def _keywords(kind: st.SearchStrategy[Any], **optional: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.fixed_dictionaries({"type": kind}, optional=optional)


_LEAVES = st.one_of(
    _keywords(st.just("string"), minLength=st.integers(0, 4), maxLength=st.integers(4, 12)),
    _keywords(st.just("string"), pattern=st.sampled_from(PATTERNS)),
    _keywords(st.just("string"), format=st.sampled_from(sorted(FORMATS))),
    _keywords(st.sampled_from(["integer", "number"]), minimum=st.integers(-500, 0), maximum=st.integers(10, 9999)),
    _keywords(st.just("number"), exclusiveMinimum=st.integers(-5, 0), exclusiveMaximum=st.integers(1, 5)),
    _keywords(st.just("integer"), multipleOf=st.sampled_from([2, 3, 5, 10]), minimum=st.just(0)),
    _keywords(st.sampled_from(["boolean", "null", ["boolean", "null"]])),
    st.fixed_dictionaries({"enum": st.lists(_SCALARS, min_size=1, max_size=5, unique_by=repr)}),
    st.fixed_dictionaries({"const": _SCALARS}),
)
_NAMES = st.text('abcdefghij _-é"\\', min_size=1, max_size=6)


def _larger(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(_objects(inner), _lists(inner), st.lists(inner, min_size=2, max_size=3).map(_any_of))


def _any_of(schemas: list[Any]) -> Any:
    return {"anyOf": schemas}


@st.composite
def _objects(draw: st.DrawFn, inner: st.SearchStrategy[Any]) -> Any:
    properties = draw(st.dictionaries(_NAMES, inner, max_size=4))
    schema = {
        "type": "object",
        "properties": properties,
        "additionalProperties": draw(st.sampled_from([False, False, {"type": "null"}])),
    }
    schema["required"] = [name for name in properties if draw(st.booleans())]
    if len(schema["required"]) == len(properties) and draw(st.booleans()):
        schema["maxProperties"] = max(1, len(properties))
    return schema


@st.composite
def _lists(draw: st.DrawFn, inner: st.SearchStrategy[Any]) -> Any:
    schema: dict[str, Any] = {"type": "array", "items": draw(inner), "maxItems": draw(st.integers(2, 4))}
    if draw(st.booleans()):
        schema["minItems"] = draw(st.integers(0, 2))
    if draw(st.booleans()):
        schema["prefixItems"] = draw(st.lists(inner, min_size=1, max_size=2))
    return schema


@st.composite
def _documents(draw: st.DrawFn) -> Any:
    schema = draw(st.recursive(_LEAVES, _larger, max_leaves=6))
    if draw(st.integers(0, 4)) == 0:  # a list of itself, behind a reference
        node = {
            "type": "object",
            "required": ["v"],
            "additionalProperties": False,
            "properties": {"v": schema, "next": {"$ref": "#/$defs/node"}},
        }
        return {"$defs": {"node": node}, "$ref": "#/$defs/node"}
    return schema


@dataclass(frozen=True)
class ShapeCase:
    """A shape, its grammar, and who says if a text has it."""

    name: str
    grammar: str
    has_shape: Callable[[str], bool]


def _case(name: str, has_shape: Callable[[str], bool], **shape: Any) -> ShapeCase:
    return ShapeCase(name, grammar_of(generation_pb2.StructuredOutput(**shape), {}), has_shape)


_FORMATS = jsonschema.FormatChecker(("email", "ipv4", "ipv6", "uuid"))


@_FORMATS.checks("date", ValueError)
def _is_date(value: object) -> bool:
    """The grammar knows how many days months have, and not which years are leap years."""
    return not isinstance(value, str) or bool(date.fromisoformat(f"2000{value[4:]}"))


def _check_pattern(
    validator: Any, pattern: str, instance: object, schema: object
) -> Iterator[jsonschema.ValidationError]:
    """Check a keyword `pattern`. `jsonschema` itself uses `re`, which has no classes of Unicode such as `\\p{Lu}`."""
    if isinstance(instance, str) and not regex.search(pattern, instance):
        yield jsonschema.ValidationError(f"{instance!r} does not match {pattern!r}")


_Validator = jsonschema.validators.extend(jsonschema.Draft202012Validator, {"pattern": _check_pattern})


def schema_case(schema: Any) -> ShapeCase:
    """JSON of a schema, as `jsonschema` sees it."""
    validator = _Validator(schema, format_checker=_FORMATS)
    text = json.dumps(schema)

    def has_shape(answer: str) -> bool:
        try:
            return validator.is_valid(json.loads(answer))
        except ValueError:
            return False

    return _case(text, has_shape, json_schema=text)


def schema_cases(count: int) -> list[ShapeCase]:
    """Different schemas, the same ones each time."""
    found: dict[str, Any] = {}

    @settings(
        max_examples=3 * count + 50,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(_documents())
    def collect(schema: Any) -> None:
        found.setdefault(json.dumps(schema), schema)

    collect()
    schemas = list(found.values())
    random.Random(count).shuffle(schemas)
    assert len(schemas) >= count, len(schemas)
    return [schema_case(schema) for schema in schemas[:count]]


def other_cases() -> list[ShapeCase]:
    """Regular expressions, which Python reads in the same way, and choices."""
    expressions = (
        *(r"(yes|no)+!", r"[a-f]{3,9}\d*\.", r"\d{4}-\d\d-\d\d", r"(a|b|ab)*c", r"[^a]{1,20}", r"(\w+ ){1,3}end"),
        *(r"[\s\S]{0,5}", r"(?:x/y|\\n)\n?", "ü{2,4}|語+"),
    )
    choices = (("yes", "no"), ("a", "ab", "abc"), tuple(f"option {number}" for number in range(200)), ('"', "\\", "\n"))
    return [
        *(_case(text, _matches(text), regex=text) for text in expressions),
        *(_case(repr(texts[:4]), texts.__contains__, choice=generation_pb2.Choice(texts=texts)) for texts in choices),
    ]


def _matches(expression: str) -> Callable[[str], bool]:
    return lambda text: re.fullmatch(expression, text, re.ASCII) is not None
