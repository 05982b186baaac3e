"""Conversion of any shape that a request can ask for to one grammar for the executor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from scalellm.services.common.errors import StatusError
from scalellm.services.common.field_rules import MAX_STRUCTURE_BYTES, STRUCTURE_LISTS
from scalellm.services.tokenizer.structure import lark
from scalellm.services.tokenizer.structure.json_schema import checked_schema
from scalellm.v1 import generation_pb2

_FIELD = "structured_output"
_ANY_OBJECT = '{"type": "object"}'
_ANY_VALUE = "true"


def grammar_of(structured: generation_pb2.StructuredOutput, special_ids: Mapping[str, int]) -> str:
    """Return the grammar of a shape.

    Args:
        structured: The client's shape.
        special_ids: The model's special tokens, by their texts.

    Raises StatusError that names the field and the limit. Regular expressions and grammars are not validated here: the
    executor refuses invalid ones before the first token.
    """
    kind = structured.WhichOneof("shape")
    if kind is None:
        shapes = "json_schema, json_object, regex, choice, lark and structural_tag"
        raise StatusError.invalid(_FIELD, f"one of {shapes} must be set")
    size = structured.ByteSize()
    if size > MAX_STRUCTURE_BYTES:
        raise StatusError.invalid(f"{_FIELD}.{kind}", f"must have at most {MAX_STRUCTURE_BYTES} bytes, got {size}")
    match kind:
        case "json_schema":
            return _start(lark.json_value(checked_schema(structured.json_schema, f"{_FIELD}.json_schema")))
        case "json_object":
            return _start(lark.json_value(checked_schema(_ANY_OBJECT, f"{_FIELD}.json_object")))
        case "regex":
            if not structured.regex:
                raise StatusError.invalid(f"{_FIELD}.regex", "must not be empty")
            return _start(lark.regex(structured.regex))
        case "choice":
            return _start(" | ".join(map(lark.text, _choices(structured.choice))))
        case "lark":
            if not structured.lark.strip():
                raise StatusError.invalid(f"{_FIELD}.lark", "must not be empty")
            return structured.lark
        case _:
            return _tagged(structured.structural_tag, special_ids)


def _start(rule: str) -> str:
    return f"start: {rule}\n"


def _choices(choice: generation_pb2.Choice) -> Sequence[str]:
    _check_count("choice.texts", choice.texts)
    for index, text in enumerate(choice.texts):
        if not text:
            raise StatusError.invalid(f"{_FIELD}.choice.texts[{index}]", "must not be empty")
    return choice.texts


def _tagged(tag: generation_pb2.StructuralTag, special_ids: Mapping[str, int]) -> str:
    """Return the grammar of a structural tag: any text up to a trigger, then one of the structures that begin
    with it.
    """
    field = f"{_FIELD}.structural_tag"
    _check_count("structural_tag.structures", tag.structures)
    _check_count("structural_tag.triggers", tag.triggers)
    if "" in tag.triggers:
        raise StatusError.invalid(f"{field}.triggers[{list(tag.triggers).index('')}]", "must not be empty")
    rules = [
        f"start: ({' | '.join(f'part_{index}' for index in range(len(tag.structures)))})* rest",
        "rest: TEXT",
        r"TEXT: /(.|\n)*/",
    ]
    for index, structure in enumerate(tag.structures):
        where = f"{field}.structures[{index}]"
        trigger = max(filter(structure.begin.startswith, tag.triggers), key=len, default=None)
        if trigger is None:
            raise StatusError.invalid(f"{where}.begin", "must begin with one of the triggers")
        schema = checked_schema(structure.json_schema or _ANY_VALUE, f"{where}.json_schema")
        begin, end = lark.text(structure.begin[len(trigger) :]), lark.text(structure.end)
        if (token_id := special_ids.get(trigger)) is not None:
            head = f"TEXT {lark.token(token_id)}"
        else:
            rules.append(f"trigger_{index}[lazy]: TEXT {lark.text(trigger)}")
            head = f"trigger_{index}"
        rules.append(f"part_{index}: {head} {begin} {lark.json_value(schema)} {end}")
    return "\n".join(rules) + "\n"


def _check_count(name: str, values: Sequence[object]) -> None:
    if fault := STRUCTURE_LISTS[name].fault(values):
        raise StatusError.invalid(f"{_FIELD}.{name}", fault)
