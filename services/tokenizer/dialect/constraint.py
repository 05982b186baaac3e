"""The grammar of an answer: what a model may write by its dialect, in llguidance's variant of Lark."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from scalellm.services.common.errors import StatusError
from scalellm.services.tokenizer.dialect.calls import MAX_CALLS, CalledTool, Calls
from scalellm.services.tokenizer.dialect.dialect import CallFormat, Channels, Dialect, PythonArguments, TaggedArguments
from scalellm.services.tokenizer.dialect.opening import Opening
from scalellm.services.tokenizer.dialect.python_grammar import python_arguments
from scalellm.services.tokenizer.dialect.schemas import definitions_of, is_text, properties_of
from scalellm.services.tokenizer.structure import lark
from scalellm.services.tokenizer.structure.json_schema import checked_schema

_TEXT = r"TEXT: /(.|\n)*/"
_ANY_OBJECT = '{"type": "object"}'
_OF_TEXTS = frozenset({"type", "title", "description", "default", "examples", "enum", "const"})
"""Keywords of a string's schema that are supported for tagged arguments."""


class AnswerGrammar:
    """Makes the grammar of answers to one request. Raises StatusError for schemas that cannot be followed.

    Args:
        dialect: The model's dialect.
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
        self._can_bound_reasoning = dialect.end_of_reasoning in added_ids
        """True if the mark that ends reasoning is one token, so that a budget can be enforced."""

    def of(self, calls: Calls | None, shape: str, opening: Opening, budget: int | None) -> str:
        """Return the grammar; empty where anything may be written.

        Args:
            calls: Functions that the answer may call; None: nothing.
            shape: The shape of its text: a grammar whose first rule is `start`; empty: any text.
            opening: The part in which it begins.
            budget: Most tokens of its reasoning; None: no limit.
        """
        if calls is None and not shape and (budget is None or opening is Opening.BEHIND_REASONING):
            return ""
        rules: list[str] = []
        if (channels := self._dialect.channels) is not None:
            start = self._messages(channels, calls, opening, budget, "answer" if shape else "TEXT", rules)
        else:
            body = self._calls(calls, rules, shape) if calls is not None else "answer" if shape else "TEXT"
            start = self._behind_reasoning(body, opening, budget, rules)
        if shape:
            rules.append(shape.replace("start:", "answer:", 1).rstrip("\n"))
        if not any(rule.startswith("TEXT:") for rule in "\n".join(rules).split("\n")):
            rules.append(_TEXT)
        return "\n".join([f"start: {start}", *rules]) + "\n"

    def _behind_reasoning(self, body: str, opening: Opening, budget: int | None, rules: list[str]) -> str:
        """Return the expression for the body, with reasoning before it if the answer may have any."""
        marks = self._dialect.reasoning
        if marks is None or opening is Opening.BEHIND_REASONING or not self._can_bound_reasoning:
            return body
        end = lark.token(self._added_ids[marks.end])
        rules.append(f"reasoning: {self._thoughts(marks.end, budget)} {end} SPACE".replace("  ", " "))
        rules.append(r"SPACE: /[ \n]{0,4}/")
        if opening is Opening.IN_REASONING:
            return f"reasoning {body}"
        return f"({self._literal(marks.begin)} reasoning)? {body}"

    def _thoughts(self, end: str, budget: int | None) -> str:
        """Return the expression for reasoning up to the mark that ends it."""
        excluded = sorted({self._added_ids[end], *self._end_ids, *self._special_ids.values()})
        thought = f"<[^{','.join(map(str, excluded))}]>"
        return f"{thought}*" if budget is None else f"{thought}{{0,{budget}}}" if budget else ""

    def _messages(
        self,
        channels: Channels,
        calls: Calls | None,
        opening: Opening,
        budget: int | None,
        answer: str,
        rules: list[str],
    ) -> str:
        """Return the expression for an answer of messages: reasoning, text before a call, and finally a call or an
        answer.

        Where reasoning has a budget there is one message of it, before all others.
        """
        following = self._literal(channels.end + channels.begin)
        are_required = calls is not None and calls.are_required
        last = [] if are_required else [f"{self._literal(channels.header(channels.answer))} {answer}"]
        for index, tool in enumerate(calls.tools if calls is not None else ()):
            rules.append(f"call_{index}: {self._message(channels, tool)}")
            last.append(f"call_{index}")
        rules.append(f"last: {' | '.join(last)}")
        if opening is Opening.BEHIND_REASONING:  # in the text of an answer
            return f"{following} last" if are_required else answer
        first, before = "", []
        if self._can_bound_reasoning:
            rules.append(f"thoughts: {self._thoughts(channels.end, budget)} {following}")
            thinking = f"{self._literal(channels.header(channels.reasoning))} thoughts"
            if opening is Opening.IN_REASONING:
                first = "thoughts "
            elif budget is not None:
                first = f"({thinking})? "
            if budget is None:
                before.append(thinking)
        if calls is not None:
            before.append(f"{self._literal(channels.header(channels.aside))} TEXT {following}")
        others = f"({' | '.join(before)})* " if before else ""
        return f"{first}{others}last"

    def _message(self, channels: Channels, tool: CalledTool) -> str:
        """Return the expression for the header and the text of a call."""
        to = channels.recipient + tool.name
        channel, body = channels.channel + channels.aside, self._literal(channels.body)
        header = f"({self._literal(to + channel)} | {self._literal(channel + to)})"
        form = f"({' | '.join(map(self._literal, channels.forms))})?"
        return f"{header} {form} {body} {self._arguments_as_json(tool)}"

    def _calls(self, calls: Calls, rules: list[str], shape: str) -> str:
        """Return the expression for the calls, with text around them unless calls are required."""
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
            space = r"\s\x1c-\x1f"  # white space that the splitter drops before calls
            rules.append(rf"PLAIN: /[{space}]*([^{space}\{written.opening[0]}](.|\n)*)?/")
            return f"({self._literal(written.opening)} {rest} | PLAIN)"
        head = self._head(written, rules)
        if calls.is_single:
            return f"({head} {rest} | TEXT)"
        return f"({head} {rest})* TEXT"

    def _head(self, written: CallFormat, rules: list[str]) -> str:
        """Return the expression for text up to the first name. After the trigger only a call may follow."""
        remainder = self._literal(written.opening[len(written.trigger) :])
        if (token_id := self._special_ids.get(written.trigger)) is not None:
            return f"TEXT {lark.token(token_id)} {remainder}"
        rules.append(f"trigger[lazy]: TEXT {lark.text(written.trigger)}")
        return f"trigger {remainder}"

    def _call(self, written: CallFormat, tool: CalledTool, index: int, rules: list[str]) -> str:
        """Return the expression for a call from its name to its arguments."""
        name = tool.name
        number = " /:[0-9]{1,4}/" if written.is_numbered else ""
        if isinstance(written.arguments, TaggedArguments):
            arguments = self._tagged(written.arguments, tool, index, rules)
        elif isinstance(written.arguments, PythonArguments):
            arguments = python_arguments(tool, str(index), rules)
        else:
            arguments = self._arguments_as_json(tool)
        if number:
            return f"{lark.text(name)}{number} {self._literal(written.between)} {arguments}"
        return f"{self._literal(name + written.between)} {arguments}"

    def _arguments_as_json(self, tool: CalledTool) -> str:
        schema = tool.schema if tool.schema is not None else _ANY_OBJECT
        return lark.json_value(checked_schema(schema, tool.field))

    def _tagged(self, tags: TaggedArguments, tool: CalledTool, index: int, rules: list[str]) -> str:
        """Return the expression for tagged arguments, in the order of the schema."""
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
            whole = value if isinstance(value, bool) else {**definitions_of(schema), **value}
            return f"{lark.json_value(checked_schema(json.dumps(whole), tool.field))} {after}"
        if unknown := sorted(value.keys() - _OF_TEXTS):
            raise StatusError.invalid(
                tool.field,
                f"has the string keyword {unknown[0][:64]!r}, which is not supported in this model's format of calls; "
                "with strict set to false the schema is not enforced",
            )
        choices = [value["const"]] if "const" in value else value.get("enum")
        if choices is not None:
            return f"({' | '.join(map(lark.text, choices))}) {after}"
        rules.append(f"text_{place}[lazy]: TEXT {after}")
        return f"text_{place}"

    def _literal(self, text: str) -> str:
        return lark.literal(text, self._special_ids)
