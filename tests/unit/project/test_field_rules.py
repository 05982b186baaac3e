"""The table of field rules, and what clients read of it in the comments of the protos."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
from google.protobuf.descriptor import FieldDescriptor

from scalellm.services.common.field_rules import (
    CHAT_LISTS,
    MAX_SCHEMA_DEPTH,
    MAX_STRUCTURE_BYTES,
    REQUEST,
    SAMPLING,
    SAMPLING_LISTS,
    STRUCTURE_LISTS,
    ListRule,
    NumberRule,
    sampling_faults,
)
from scalellm.services.tokenizer.http.api_request import SamplingRequest
from scalellm.v1 import common_pb2, generation_pb2

PROTOS = Path(__file__).resolve().parents[3] / "protos" / "scalellm" / "v1"
KINDS = {
    FieldDescriptor.TYPE_UINT32: (int, 2**32 - 1),
    FieldDescriptor.TYPE_INT32: (int, 2**31 - 1),
    FieldDescriptor.TYPE_UINT64: (int, 2**64 - 1),
    FieldDescriptor.TYPE_FLOAT: (float, math.inf),
    FieldDescriptor.TYPE_BOOL: (bool, 1),
}
"""Types on the wire: what Python holds them as, and the most that they hold."""


def comments(file: str) -> Mapping[str, str]:
    """Comments above each message ("SamplingParams") and each field ("SamplingParams.n")."""
    found: dict[str, str] = {}
    message, lines = "", []
    for line in (PROTOS / file).read_text(encoding="utf-8").splitlines():
        if (comment := re.fullmatch(r" *// ?(.*)", line)) is not None:
            lines.append(comment[1])
            continue
        if (opened := re.match(r"message (\w+) ", line)) is not None:
            message = opened[1]
            found[message] = " ".join(lines)
        elif (field := re.match(r" +(?:optional |repeated )?[\w.]+ (\w+) = \d+;", line)) is not None:
            found[f"{message}.{field[1]}"] = " ".join(lines)
        lines = []
    return found


COMMENTS = {**comments("common.proto"), **comments("generation.proto")}
NUMBERS = [
    *((f"SamplingParams.{name}", rule) for name, rule in SAMPLING.items()),
    *((f"GenerateRequest.{name}", rule) for name, rule in REQUEST.items()),
    *((f"LogitBias.{rule.entry.name}", rule.entry) for rule in SAMPLING_LISTS.values() if rule.entry is not None),
]
LISTS = [
    *((f"SamplingParams.{name}", rule) for name, rule in SAMPLING_LISTS.items()),
    ("Choice.texts", STRUCTURE_LISTS["choice.texts"]),
    ("StructuralTag.structures", STRUCTURE_LISTS["structural_tag.structures"]),
    ("StructuralTag.triggers", STRUCTURE_LISTS["structural_tag.triggers"]),
    ("Chat.tools", CHAT_LISTS["tools"]),
    ("ChatMessage.tool_calls", CHAT_LISTS["messages.tool_calls"]),
]


@pytest.mark.parametrize(("field", "rule"), NUMBERS, ids=lambda value: value if isinstance(value, str) else "")
def test_the_protos_name_the_range_and_the_default_of_a_number(field: str, rule: NumberRule) -> None:
    said = COMMENTS[field]
    assert rule.limits.lower() in said.lower()
    intervals = re.findall(r"[\[(]-?\d+, \d+\]|[Aa]t least \d+", said)
    assert [found.lower() for found in intervals] == [rule.interval] * bool(rule.interval)
    assert len(re.findall(r"default", said, re.IGNORECASE)) == (rule.default is not None)


@pytest.mark.parametrize(("field", "rule"), LISTS, ids=lambda value: value if isinstance(value, str) else "")
def test_the_protos_name_how_many_entries_a_list_may_have(field: str, rule: ListRule) -> None:
    assert re.findall(r"(?:at most|\d+ to) \d+ entries", COMMENTS[field].lower()) == [rule.limits]


def test_the_protos_name_the_sizes_of_shapes() -> None:
    assert f"{MAX_STRUCTURE_BYTES // 1024} KiB" in COMMENTS["StructuredOutput"]
    assert f"{MAX_SCHEMA_DEPTH} levels deep" in COMMENTS["StructuredOutput.json_schema"]


def test_each_sampling_field_of_the_protos_has_a_rule_that_its_type_can_hold() -> None:
    fields = {field.name: field for field in common_pb2.SamplingParams.DESCRIPTOR.fields}
    assert fields.keys() == SAMPLING.keys() | SAMPLING_LISTS.keys()
    for message, rules in ((common_pb2.SamplingParams, SAMPLING), (generation_pb2.GenerateRequest, REQUEST)):
        for name, rule in rules.items():
            kind, most = KINDS[message.DESCRIPTOR.fields_by_name[name].type]
            assert rule.kind is kind, name
            assert rule.high is None or rule.high <= most, name
            assert rule.default is None or not rule.fault(rule.default), name


def test_http_knows_each_of_them() -> None:
    known = SamplingRequest.model_fields.keys()
    assert (SAMPLING.keys() | SAMPLING_LISTS.keys()) - known == {"logprobs"}  # each API of OpenAI's has another form
    assert REQUEST.keys() <= known


@pytest.mark.parametrize(
    ("values", "faults"),
    [
        ({}, {}),
        ({"n": None, "temperature": 0.0, "logit_bias": ()}, {}),
        ({"top_p": 0.0, "min_p": 1.0}, {"top_p": "must be in (0, 1], got 0"}),
        ({"temperature": math.nan}, {"temperature": "must be in [0, 100], got nan"}),
        ({"max_tokens": 0}, {"max_tokens": "must be at least 1, got 0"}),
        ({"min_tokens": 3, "max_tokens": 2}, {"min_tokens": "must be at most max_tokens (2), got 3"}),
        ({"stop_token_ids": range(65)}, {"stop_token_ids": "must have at most 64 entries, got 65"}),
        ({"n": 17, "logprobs": 21}, {"n": "must be in [1, 16], got 17", "logprobs": "must be in [0, 20], got 21"}),
    ],
)
def test_a_fault_says_what_must_be_and_what_is(values: Mapping[str, object], faults: Mapping[str, str]) -> None:
    assert dict(sampling_faults(values)) == faults
