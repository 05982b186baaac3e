"""From the shape that a client asks for to a grammar, and the refusals on the way."""

from __future__ import annotations

import json
from typing import Any

import grpc
import pytest

from scalellm.services.common.errors import StatusError
from scalellm.services.common.field_rules import MAX_SCHEMA_DEPTH
from scalellm.services.tokenizer.structure import grammar_of
from scalellm.services.tokenizer.structure.json_schema import checked_schema
from scalellm.v1 import generation_pb2

OBJECT = '{"type": "object"}'


def grammar(special_ids: dict[str, int] | None = None, **shape: Any) -> str:
    return grammar_of(generation_pb2.StructuredOutput(**shape), special_ids or {})


def refusal(**shape: Any) -> StatusError:
    with pytest.raises(StatusError) as caught:
        grammar(**shape)
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.message.startswith(f"{caught.value.field}: ")
    return caught.value


def nested(levels: int) -> str:
    return '{"items": ' * levels + "{}" + "}" * levels


def choice(*texts: str) -> generation_pb2.Choice:
    return generation_pb2.Choice(texts=texts)


def tag(begin: str, *triggers: str, schema: str = "") -> generation_pb2.StructuralTag:
    structure = generation_pb2.TagStructure(begin=begin, json_schema=schema, end="</f>")
    return generation_pb2.StructuralTag(structures=[structure], triggers=triggers)


@pytest.mark.parametrize(
    ("shape", "field", "says"),
    [
        ({}, "structured_output", "must be set"),
        ({"json_schema": ""}, "structured_output.json_schema", "is not JSON"),
        ({"json_schema": "{"}, "structured_output.json_schema", "is not JSON"),
        ({"json_schema": "3"}, "structured_output.json_schema", "an object, true or false at #, got 3"),
        ({"json_schema": '{"minimum": NaN}'}, "structured_output.json_schema", "NaN"),
        ({"json_schema": '{"minimum": 1e999}'}, "structured_output.json_schema", "too large"),
        ({"json_schema": '{"minimum": ' + "9" * 5000 + "}"}, "structured_output.json_schema", "too many digits"),
        ({"json_schema": "[" * 60_000}, "structured_output.json_schema", "levels deep"),
        ({"json_schema": nested(MAX_SCHEMA_DEPTH + 1)}, "structured_output.json_schema", f"{MAX_SCHEMA_DEPTH} levels"),
        ({"json_schema": '{"uniqueItems": true}'}, "structured_output.json_schema", "'uniqueItems' at #,"),
        ({"json_schema": '{"nullable": true}'}, "structured_output.json_schema", "'nullable'"),
        ({"json_schema": '{"x-guidance": {"lenient": true}}'}, "structured_output.json_schema", "'x-guidance'"),
        ({"json_schema": '{"items": 3}'}, "structured_output.json_schema", "at #/items, got 3"),
        ({"json_schema": '{"format": "color"}'}, "structured_output.json_schema", "'color' at #;"),
        ({"json_schema": '{"$ref": "http://x/y"}'}, "structured_output.json_schema", "nothing is fetched"),
        (
            {"json_schema": r'{"enum": [{"a": ["\u0011"]}]}'},
            "structured_output.json_schema",
            "control character in enum",
        ),
        ({"json_schema": r'{"const": "a\\\u0001"}'}, "structured_output.json_schema", "control character in const"),
        (
            {"json_schema": r'{"properties": {"\u001f": {}}}'},
            "structured_output.json_schema",
            "control character in prop",
        ),
        ({"json_schema": '{"minProperties": 2}'}, "structured_output.json_schema", "minProperties 2"),
        (
            {"json_schema": '{"properties": {"a": {}, "b": {}}, "required": ["a"], "maxProperties": 2}'},
            "structured_output.json_schema",
            "maxProperties at #, which is supported only where all of `properties` are required, beside the optional "
            "property 'b'",
        ),
        ({"json_schema": '"' + "a" * 2**16 + '"'}, "structured_output.json_schema", "65536 bytes"),
        ({"regex": ""}, "structured_output.regex", "empty"),
        ({"regex": "a" * 2**16}, "structured_output.regex", "65536 bytes"),
        ({"lark": " \n"}, "structured_output.lark", "empty"),
        ({"choice": choice()}, "structured_output.choice.texts", "1 to 1024"),
        ({"choice": choice(*"a" * 1025)}, "structured_output.choice.texts", "1 to 1024"),
        ({"choice": choice("a", "")}, "structured_output.choice.texts[1]", "empty"),
        ({"structural_tag": tag("<f>")}, "structured_output.structural_tag.triggers", "1 to 64"),
        ({"structural_tag": tag("<f>", "<g", "")}, "structured_output.structural_tag.triggers[1]", "empty"),
        ({"structural_tag": tag("<f>", "<g")}, "structured_output.structural_tag.structures[0].begin", "triggers"),
        (
            {"structural_tag": tag("<f>", "<f", schema='{"not": {}}')},
            "structured_output.structural_tag.structures[0].json_schema",
            "'not'",
        ),
    ],
)
def test_a_refusal_names_the_field_and_the_limit(shape: dict[str, Any], field: str, says: str) -> None:
    error = refusal(**shape)
    assert error.field == field
    assert says in error.message


@pytest.mark.parametrize(
    ("place", "path"),
    [
        ({"properties": {"a": {"not": {}}}}, "#/properties/a"),
        ({"$defs": {"a": {"items": {"not": {}}}}}, "#/$defs/a/items"),
        ({"anyOf": [{}, {"not": {}}]}, "#/anyOf/1"),
        ({"prefixItems": [{"not": {}}]}, "#/prefixItems/0"),
        ({"patternProperties": {"^a": {"not": {}}}}, "#/patternProperties/^a"),
        ({"additionalProperties": {"not": {}}}, "#/additionalProperties"),
    ],
)
def test_a_keyword_is_found_wherever_a_schema_may_stand(place: dict[str, Any], path: str) -> None:
    assert f"'not' at {path}," in refusal(json_schema=json.dumps(place)).message


def test_names_of_properties_and_values_are_no_keywords() -> None:
    schema = {
        "properties": {"not": {"enum": [{"not": 1}], "default": {"if": 1}}},
        "examples": [{"contains": 1}],
        "x-order": 3,
        "description": "\x01",
        "const": "\\u0001 \n\t\x7f",
        "required": ["not"],
        "minProperties": 1,
    }
    told = json.loads(checked_schema(json.dumps(schema), "f"))
    assert told.pop("x-guidance")["whitespace_pattern"]
    assert told == schema
    assert checked_schema("true", "f") == "true"


def test_a_long_path_is_cut() -> None:
    inner: dict[str, Any] = {"not": {}}
    for _ in range(20):
        inner = {"properties": {"a" * 100: inner}}
    assert len(refusal(json_schema=json.dumps(inner)).message) < 500


def test_texts_are_quoted() -> None:
    assert grammar(choice=choice('say "a"', "b\n")) == 'start: "say \\"a\\"" | "b\\n"\n'
    assert grammar(regex="a/b\nc\\/\\\n") == "start: /a\\/b\\nc\\/\\n/\n"
    assert grammar(lark='start: "x"') == 'start: "x"'
    assert grammar(json_object={}) == f"start: %json {checked_schema(OBJECT, 'f')}\n"


def test_a_trigger_that_is_a_special_token_stands_for_the_token() -> None:
    assert 'trigger_0[lazy]: TEXT "<f"\n' in grammar(structural_tag=tag("<f>", "<f"))
    assert "part_0: TEXT <[7]> " in grammar({"<f>": 7}, structural_tag=tag("<f>", "<f", "<f>"))


def test_classes_of_characters_are_those_of_ascii() -> None:
    """Classes mean what JSON Schema says; what is escaped itself, or is no class, stays."""
    assert grammar(regex=r"\d+[\w.]\\d\s\D") == "start: /[0-9]+[[0-9A-Za-z_].]\\\\d\\s[^0-9]/\n"
    schema = {"pattern": r"^\d$", "patternProperties": {r"\w": {"pattern": r"\W"}}, "const": {"pattern": r"\d"}}
    told = json.loads(checked_schema(json.dumps(schema), "f"))
    assert told["pattern"] == "^[0-9]$"
    assert told["patternProperties"] == {"[0-9A-Za-z_]": {"pattern": "[^0-9A-Za-z_]"}}
    assert told["const"] == schema["const"]
