"""The fields of OpenAI's APIs, and of vLLM's additions to them, for the shape of an answer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from scalellm.services.common.errors import StatusError
from scalellm.services.common.sent_text import as_text
from scalellm.v1 import generation_pb2

_OURS = "structured_output"
_NO_NAMES: Mapping[str, str] = MappingProxyType({})

_OPTIONS: Mapping[str, Sequence[object]] = MappingProxyType(
    {
        "disable_fallback": (True, False),
        "disable_any_whitespace": (False,),
        "disable_additional_properties": (False,),
        "whitespace_pattern": (),
    }
)
"""Further fields of vLLM's structured_outputs, with the values that change nothing here."""

_GUIDED = ("json", "regex", "choice", "grammar")


class Shape(NamedTuple):
    """The shape that a request asks for, None for any text, and the client's names of our fields of it."""

    wire: generation_pb2.StructuredOutput | None = None
    names: Mapping[str, str] = _NO_NAMES


def shape_of(fields: Mapping[str, object]) -> Shape:
    """Return the shape that one of several fields gives. Raises StatusError for an invalid one, or more than one.

    Args:
        fields: Fields by name: `response_format`, vLLM's `structured_outputs`, its older `guided_json`, `guided_regex`,
            `guided_choice` and `guided_grammar`.
    """
    found: dict[str, Shape] = {}
    for name, value in fields.items():
        if value is None:
            continue
        if name == "response_format":
            shape = shape_of_format(value, name)
        elif name == "structured_outputs":
            shape = _structured_outputs(value)
        else:
            shape = _one_of_vllms(name.removeprefix("guided_"), value, name)
        if shape.wire is not None:
            found[name] = shape
    if len(found) > 1:
        first, second, *_ = found
        raise StatusError.invalid(second, f"must not be set beside {first}: an answer has one shape")
    return next(iter(found.values()), Shape())


def shape_of_format(value: object, param: str) -> Shape:
    """Return the shape of a `response_format`, or of a `text.format` of the Responses API. Raises StatusError."""
    if not isinstance(value, dict):
        raise StatusError.invalid(param, "must be an object")
    match value.get("type"):
        case "text":
            return Shape()
        case "json_object":
            wire = generation_pb2.StructuredOutput(json_object=generation_pb2.JsonObject())
            return Shape(wire, {_OURS: param})
        case "json_schema":
            # Chats have the schema one level deeper than responses.
            inner = value.get("json_schema", value)
            where = f"{param}.json_schema" if "json_schema" in value else param
            if not isinstance(inner, dict):
                raise StatusError.invalid(where, "must be an object")
            if inner.get("schema") is None:
                raise StatusError.invalid(f"{where}.schema", "is required")
            return _json_schema(inner["schema"], f"{where}.schema", {_OURS: param})
        case "structural_tag":
            return _structural_tag(value, param)
        case kind:
            shown = repr(kind[:64]) if isinstance(kind, str) else "none"
            raise StatusError.invalid(
                f"{param}.type", f"must be text, json_object, json_schema or structural_tag, got {shown}"
            )


def _structured_outputs(value: object) -> Shape:
    param = "structured_outputs"
    if not isinstance(value, dict):
        raise StatusError.invalid(param, "must be an object")
    given = {name: inner for name, inner in value.items() if inner is not None}
    for name, harmless in _OPTIONS.items():
        option = given.pop(name, None)
        if option is not None and option not in harmless:
            raise StatusError.invalid(f"{param}.{name}", "is not supported here")
    if given.get("json_object") is False:
        del given["json_object"]
    if len(given) != 1:
        raise StatusError.invalid(
            param, f"must hold one of json, json_object, regex, choice, grammar and structural_tag, got {len(given)}"
        )
    ((name, inner),) = given.items()
    where = f"{param}.{name[:64]}"
    if name == "json_object":
        if inner is not True:
            raise StatusError.invalid(where, "must be true or false")
        return shape_of_format({"type": "json_object"}, where)
    if name == "structural_tag":
        return _structural_tag(_parsed(inner, where), where)
    return _one_of_vllms(name, inner, where)


def _one_of_vllms(name: str, value: object, param: str) -> Shape:
    wire = generation_pb2.StructuredOutput()
    match name:
        case "json":
            return _json_schema(value, param, {})
        case "regex":
            wire.regex = as_text(value, param)
            ours = "regex"
        case "choice":
            if not isinstance(value, list):
                raise StatusError.invalid(param, "must be a list of strings")
            wire.choice.SetInParent()
            wire.choice.texts.extend(as_text(text, f"{param}[{index}]") for index, text in enumerate(value))
            ours = "choice.texts"
        case "grammar":
            wire.lark = as_text(value, param)
            if "::=" in wire.lark:
                raise StatusError.invalid(param, "must be written in Lark (`start: ...`): rules with ::= are not read")
            ours = "lark"
        case _:
            raise StatusError.invalid(param, "is not a field of structured_outputs")
    return Shape(wire, {_OURS: param, f"{_OURS}.{ours}": param})


def _json_schema(schema: object, param: str, names: Mapping[str, str]) -> Shape:
    if not isinstance(schema, dict | bool | str):
        raise StatusError.invalid(param, "must be a JSON schema")
    wire = generation_pb2.StructuredOutput(json_schema=_json_text(schema, param))
    return Shape(wire, {_OURS: param, **names, f"{_OURS}.json_schema": param})


def _structural_tag(value: object, param: str) -> Shape:
    """Read the format of vLLM and SGLang: {"structures": [{"begin", "schema", "end"}], "triggers": [...]}."""
    if not isinstance(value, dict):
        raise StatusError.invalid(param, "must be an object")
    structures, triggers = value.get("structures"), value.get("triggers")
    if not isinstance(structures, list) or not all(isinstance(structure, dict) for structure in structures):
        raise StatusError.invalid(f"{param}.structures", "must be a list of objects")
    if not isinstance(triggers, list):
        raise StatusError.invalid(f"{param}.triggers", "must be a list of strings")
    tag = generation_pb2.StructuralTag()
    for index, trigger in enumerate(triggers):
        tag.triggers.append(as_text(trigger, f"{param}.triggers[{index}]"))
    names = {_OURS: param, f"{_OURS}.structural_tag": param}
    for index, structure in enumerate(structures):
        where = f"{param}.structures[{index}]"
        schema = structure.get("schema")
        tag.structures.add(
            begin=as_text(structure.get("begin"), f"{where}.begin"),
            json_schema="" if schema is None else _json_text(schema, f"{where}.schema"),
            end=as_text(structure.get("end", ""), f"{where}.end"),
        )
        names[f"{_OURS}.structural_tag.structures[{index}].json_schema"] = f"{where}.schema"
    return Shape(generation_pb2.StructuredOutput(structural_tag=tag), names)


def _json_text(value: object, param: str) -> str:
    """Return JSON as text. Clients send it either as a JSON value or as text."""
    return as_text(value, param) if isinstance(value, str) else json.dumps(value)


def _parsed(value: Any, param: str) -> object:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise StatusError.invalid(param, "is not JSON") from None
