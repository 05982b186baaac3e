"""The grammar of an answer: what a model may write by its dialect, in llguidance's variant of Lark."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scalellm.services.common.errors import StatusError
from scalellm.services.tokenizer.dialect.dialect import CallFormat, Dialect, TaggedArguments
from scalellm.services.tokenizer.dialect.splitter import Opening
from scalellm.services.tokenizer.structure import lark
from scalellm.services.tokenizer.structure.json_schema import checked_schema

MAX_CALLS = 128
"""Calls in one answer."""

_TEXT = r"TEXT: /(.|\n)*/"
_ANY_OBJECT = '{"type": "object"}'
_OF_TEXTS = frozenset({"type", "title", "description", "default", "examples", "enum", "const"})
"""Keywords of a string that tagged arguments can follow."""


@dataclass(frozen=True, slots=True)
class CalledTool:
    """A function that an answer may call.

    Attributes:
        name: Its name.
        schema: JSON Schema of its arguments, as JSON; None: any JSON object.
        field: Where the schema stands in the request.
    """

    name: str
    schema: str | None
    field: str


@dataclass(frozen=True, slots=True)
class Calls:
    """The functions that an answer may call.

    Attributes:
        tools: One of these each time.
        are_required: It has a call, and no text.
        is_single: It has no more than one.
    """

    tools: Sequence[CalledTool]
    are_required: bool = False
    is_single: bool = False


class AnswerGrammar:
    """Makes the grammar of answers to one request. Raises StatusError for schemas that cannot be followed.

    Args:
        dialect: How the model writes.
        special_ids: The model's special tokens, by their texts.
        added_ids: Tokens that have a text of their own, by it: special ones, and marks that are none.
        end_ids: Tokens that end a sample.
    """

    def __init__(
        self,
        dialect: Dialect,
        special_ids: Mapping[str, int],
        added_ids: Mapping[str, int],
        end_ids: Sequence[int],
    ) -> None:
        self._dialect = dialect
        self._special_ids = special_ids
        self._added_ids = added_ids
        self._end_ids = end_ids

    @property
    def can_bound_reasoning(self) -> bool:
        """True if the end of reasoning is a token, so that tokens before it can be counted."""
        return self._dialect.reasoning is not None and self._dialect.reasoning.end in self._added_ids

    def of(self, calls: Calls | None, shape: str, opening: Opening, budget: int | None) -> str:
        """Return the grammar; empty where anything may be written.

        Args:
            calls: What the answer may call; None: nothing.
            shape: The shape of its text: a grammar whose first rule is `start`; empty: any text.
            opening: Where it begins.
            budget: Most tokens of its reasoning; None: no limit.
        """
        rules: list[str] = []
        if calls is not None:
            body = self._calls(calls, rules, shape)
        elif shape:
            body = "answer"
        elif budget is not None and opening is not Opening.BEHIND_REASONING:
            body = "TEXT"
        else:
            return ""
        if shape:
            rules.append(shape.replace("start:", "answer:", 1).rstrip("\n"))
        start = self._behind_reasoning(body, opening, budget, rules)
        if not any(rule.startswith("TEXT:") for rule in "\n".join(rules).split("\n")):
            rules.append(_TEXT)
        return "\n".join([f"start: {start}", *rules]) + "\n"

    def _behind_reasoning(self, body: str, opening: Opening, budget: int | None, rules: list[str]) -> str:
        """Return what stands for the body with reasoning before it, as far as there may be some."""
        marks = self._dialect.reasoning
        if marks is None or opening is Opening.BEHIND_REASONING or not self.can_bound_reasoning:
            return body
        end_id = self._added_ids[marks.end]
        excluded = sorted({end_id, *self._end_ids, *self._special_ids.values()})
        thought = f"<[^{','.join(map(str, excluded))}]>"
        times = "*" if budget is None else f"{{0,{budget}}}" if budget else ""
        thoughts = f"{thought}{times}" if times else ""
        rules.append(f"reasoning: {thoughts} {lark.token(end_id)} SPACE".replace("  ", " "))
        rules.append(r"SPACE: /[ \n]{0,4}/")
        if opening is Opening.IN_REASONING:
            return f"reasoning {body}"
        return f"({self._literal(marks.begin)} reasoning)? {body}"

    def _calls(self, calls: Calls, rules: list[str], shape: str) -> str:
        """Return what stands for the calls, and for the text around them unless calls are required."""
        written = self._dialect.calls
        assert written is not None
        for index, tool in enumerate(calls.tools):
            rules.append(f"call_{index}: {self._call(written, tool, index, rules)}")
        any_call = f"({' | '.join(f'call_{index}' for index in range(len(calls.tools)))})"
        rules.append(f"call: {any_call} {self._literal(written.after)}")
        following = f"({self._literal(written.separator + written.before)} call)"
        more = "" if calls.is_single else f" {following}{{0,{MAX_CALLS - 1}}}"
        rest = f"call{more} {self._literal(written.end)}".rstrip()
        if calls.are_required:
            return f"{self._literal(written.opening)} {rest}"
        if shape:
            return f"({self._literal(written.opening)} {rest} | answer)"
        if written.is_whole:
            rules.append(rf"PLAIN: /([^{written.opening[0]}](.|\n)*)?/")
            return f"({self._literal(written.opening)} {rest} | PLAIN)"
        head = self._head(written, rules)
        if calls.is_single:
            return f"({head} {rest} | TEXT)"
        return f"({head} {rest})* TEXT"

    def _head(self, written: CallFormat, rules: list[str]) -> str:
        """Return what stands for text up to the first name: once the trigger comes, nothing but a call follows."""
        remainder = self._literal(written.opening[len(written.trigger) :])
        if (token_id := self._special_ids.get(written.trigger)) is not None:
            return f"TEXT {lark.token(token_id)} {remainder}"
        rules.append(f"trigger[lazy]: TEXT {lark.text(written.trigger)}")
        return f"trigger {remainder}"

    def _call(self, written: CallFormat, tool: CalledTool, index: int, rules: list[str]) -> str:
        """Return what stands for a call from its name to its arguments."""
        name = tool.name
        number = " /:[0-9]{1,4}/" if written.is_numbered else ""
        if isinstance(written.arguments, TaggedArguments):
            arguments = self._tagged(written.arguments, tool, index, rules)
        else:
            schema = tool.schema if tool.schema is not None else _ANY_OBJECT
            arguments = lark.json_value(checked_schema(schema, tool.field))
        if number:
            return f"{lark.text(name)}{number} {self._literal(written.between)} {arguments}"
        return f"{self._literal(name + written.between)} {arguments}"

    def _tagged(self, tags: TaggedArguments, tool: CalledTool, index: int, rules: list[str]) -> str:
        """Return what stands for arguments one by one, in the order of the schema."""
        rules.append(f"value_{index}[lazy]: TEXT {lark.text(tags.after)}")
        if tool.schema is None:
            rules.append(rf"KEY_{index}: /[^<>\n]{{1,128}}/")
            return f"({lark.text(tags.before)} KEY_{index} {lark.text(tags.between)} value_{index})*"
        checked_schema(tool.schema, tool.field)
        schema = json.loads(tool.schema)
        properties, required = properties_of(schema, tool.field)
        parts = []
        for number, (key, value) in enumerate(properties.items()):
            head = lark.text(f"{tags.before}{key}{tags.between}")
            part = f"{head} {self._tagged_value(value, schema, tags, tool, f'{index}_{number}', rules)}"
            parts.append(part if key in required else f"({part})?")
        return " ".join(parts)

    def _tagged_value(
        self,
        value: Any,
        schema: Mapping[str, Any],
        tags: TaggedArguments,
        tool: CalledTool,
        place: str,
        rules: list[str],
    ) -> str:
        after = lark.text(tags.after)
        if not is_text(value):
            whole = value if isinstance(value, bool) else {**_definitions(schema), **value}
            return f"{lark.json_value(checked_schema(json.dumps(whole), tool.field))} {after}"
        if unknown := sorted(value.keys() - _OF_TEXTS):
            raise StatusError.invalid(
                tool.field,
                f"has the keyword {unknown[0][:64]!r} of a string, which this model's way of writing calls cannot "
                "follow; set strict to false for arguments that need not",
            )
        choices = [value["const"]] if "const" in value else value.get("enum")
        if choices is not None:
            return f"({' | '.join(map(lark.text, choices))}) {after}"
        rules.append(f"text_{place}[lazy]: TEXT {after}")
        return f"text_{place}"

    def _literal(self, text: str) -> str:
        """Return what stands for a text in which special tokens are these tokens."""
        parts, plain = [], ""
        while text:
            special = max(filter(text.startswith, self._special_ids), key=len, default="")
            if special:
                parts += [lark.text(plain), lark.token(self._special_ids[special])]
                plain, text = "", text[len(special) :]
            else:
                plain, text = plain + text[0], text[1:]
        return " ".join(part for part in (*parts, lark.text(plain)) if part)


def properties_of(schema: Any, field: str = "") -> tuple[Mapping[str, Any], Sequence[str]]:
    """Return the properties of an object's schema, and which are required. Raises StatusError for another schema."""
    if not isinstance(schema, dict) or schema.get("type", "object") != "object":
        raise StatusError.invalid(field, "must be the schema of an object")
    if unknown := sorted(schema.keys() & {"anyOf", "allOf", "oneOf", "$ref", "patternProperties", "minProperties"}):
        raise StatusError.invalid(
            field, f"has the keyword {unknown[0]!r} at #, which this model's way of writing calls cannot follow"
        )
    properties = schema.get("properties", {})
    return (properties if isinstance(properties, dict) else {}), schema.get("required") or ()


def is_text(schema: Any) -> bool:
    """Return whether a schema is one of strings, and of nothing else."""
    if not isinstance(schema, dict):
        return False
    if "type" in schema:
        return bool(schema["type"] == "string")
    choices = [schema["const"]] if "const" in schema else schema.get("enum")
    return isinstance(choices, list) and bool(choices) and all(isinstance(choice, str) for choice in choices)


def _definitions(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {name: schema[name] for name in ("$defs", "definitions") if name in schema}
