"""Answers that consist of messages, each for a channel: what may be written, and what is read of it."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dialect_kit import accepts, answer_grammar, draw, make_compiler, split, told
from scalellm.services.executor.grammar import LlGrammarCompiler
from scalellm.services.tokenizer.dialect import Dialect, PartKind
from scalellm.services.tokenizer.dialect.calls import CalledTool, Calls
from scalellm.services.tokenizer.dialect.known import HARMONY
from scalellm.services.tokenizer.dialect.opening import Opening

DIALECT = Dialect(channels=HARMONY)
THOUGHT = "<|channel|>analysis<|message|>Look {it} up.<|end|>"
PREAMBLE = "<|channel|>commentary<|message|>I look.<|end|>"
FINAL = "<|channel|>final<|message|>It rains."
ARGUMENTS = '{"city": "Pa<|end|>}r\\"is", "l": [1, {}]}'
CALLS = {
    "in the channel": f"<|channel|>commentary to=functions.get_it <|constrain|>json<|message|>{ARGUMENTS}",
    "without a space": f"<|channel|>commentary to=functions.get_it<|constrain|>json<|message|>{ARGUMENTS}",
    "in the role": f" to=functions.get_it<|channel|>commentary json<|message|>{ARGUMENTS}",
    "bare": f" to=functions.get_it<|channel|>commentary<|message|>{ARGUMENTS}",
}
NEXT = "<|start|>assistant"
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer", "maximum": 7}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [CalledTool("get_it", json.dumps(SCHEMA), "get_it"), CalledTool("get", None, "get")]


@pytest.fixture(scope="module")
def compiler() -> Iterator[LlGrammarCompiler]:
    made = make_compiler()
    yield made
    made.close()


@pytest.mark.parametrize("name", CALLS)
def test_reasoning_text_and_a_call(name):
    answer = NEXT.join([THOUGHT, PREAMBLE, THOUGHT, CALLS[name]])
    parts = split(DIALECT, [answer])
    assert told(parts) == [
        ("reasoning", "Look {it} up."),
        ("text", "I look."),
        ("reasoning", "\nLook {it} up."),
        ("get_it", ARGUMENTS),
    ]
    assert parts[-1].call_id == "id0"


@pytest.mark.parametrize(
    ("answer", "opening", "expected"),
    [
        (FINAL, Opening.ANYWHERE, [("text", "It rains.")]),
        (f"{FINAL}<|return|>", Opening.ANYWHERE, [("text", "It rains.")]),
        (f"{PREAMBLE}{NEXT}{FINAL}", Opening.ANYWHERE, [("text", "I look.\nIt rains.")]),
        (f"Hm.<|end|>{NEXT}{FINAL}", Opening.IN_REASONING, [("reasoning", "Hm."), ("text", "It rains.")]),
        (" rains. ", Opening.BEHIND_REASONING, [("text", " rains. ")]),
        ("No message at all", Opening.ANYWHERE, [("text", "No message at all")]),
        ("<|chan", Opening.ANYWHERE, [("text", "<|chan")]),
        ("<|channel|>final", Opening.ANYWHERE, []),
        (f"<|channel|>{'x' * 300}", Opening.ANYWHERE, [("text", f"<|channel|>{'x' * 300}")]),
        ("<|channel|>analysis to=python<|message|>1 + 1<|call|>", Opening.ANYWHERE, [("reasoning", "1 + 1")]),
        (f"{CALLS['bare']}<|call|>{NEXT}{FINAL}", Opening.ANYWHERE, [("get_it", ARGUMENTS), ("text", "It rains.")]),
    ],
)
def test_each_message_is_what_its_channel_says(answer, opening, expected):
    assert told(split(DIALECT, list(answer), opening)) == expected


def test_without_tools_a_call_is_text_of_its_channel():
    arguments = "{}"
    (part,) = split(DIALECT, [CALLS["bare"].replace(ARGUMENTS, arguments)], has_calls=False)
    assert told([part]) == [("text", arguments)]


@given(
    pieces=st.lists(
        st.sampled_from(
            [THOUGHT, PREAMBLE, FINAL, *CALLS.values(), NEXT, "a <| b", "<|start|>user", "<|call|>", " to="]
        )
    ),
    opening=st.sampled_from(Opening),
    has_calls=st.booleans(),
    data=st.data(),
)
def test_every_way_to_cut_a_text_yields_the_same(pieces, opening, has_calls, data):
    whole = "".join(pieces)
    whole = whole[: data.draw(st.one_of(st.just(len(whole)), st.integers(0, len(whole))))]
    cuts = sorted(data.draw(st.sets(st.integers(0, len(whole)), max_size=12)))
    cut = [whole[start:end] for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    at_once = split(DIALECT, [whole], opening, has_calls=has_calls)
    assert split(DIALECT, cut, opening, has_calls=has_calls) == at_once
    assert split(DIALECT, list(whole), opening, has_calls=has_calls) == at_once


@pytest.mark.parametrize("budget", [None, 4])
@pytest.mark.parametrize("opening", [Opening.ANYWHERE, Opening.IN_REASONING])
def test_whatever_is_drawn_where_a_call_is_required_is_one(compiler, opening, budget):
    grammar = answer_grammar(DIALECT).of(Calls(TOOLS, are_required=True), "", opening, budget)
    for seed in range(6):
        text = draw(compiler, grammar, random.Random(seed))
        (called,) = (part for part in split(DIALECT, list(text), opening) if part.kind is PartKind.CALL)
        assert called.name in ("get", "get_it")
        if called.name == "get_it":
            jsonschema.validate(json.loads(called.text), SCHEMA)


def test_as_the_model_likes(compiler):
    grammar = answer_grammar(DIALECT).of(Calls(TOOLS), "", Opening.ANYWHERE, None)
    call = CALLS["in the channel"].replace(ARGUMENTS, '{"city": "Rome"}')
    for answer in ([FINAL], [THOUGHT, FINAL], [THOUGHT, PREAMBLE, THOUGHT, call], [PREAMBLE, FINAL], [call]):
        assert accepts(compiler, grammar, NEXT.join(answer))
    for answer in ([THOUGHT], [call, FINAL], [call.replace("get_it", "got")], ["Plain"], [call.replace("Rome", "R")]):
        assert not accepts(compiler, grammar, NEXT.join(answer))
    for written in CALLS.values():
        assert accepts(compiler, grammar, written.replace(ARGUMENTS, '{"city": "Rome"}'))


def test_a_budget_is_of_all_reasoning(compiler):
    grammar = answer_grammar(DIALECT).of(None, "", Opening.ANYWHERE, 3)
    for text in ("", "abc"):
        assert accepts(compiler, grammar, f"<|channel|>analysis<|message|>{text}<|end|>{NEXT}{FINAL}")
    assert accepts(compiler, grammar, FINAL)
    assert not accepts(compiler, grammar, f"<|channel|>analysis<|message|>abcd<|end|>{NEXT}{FINAL}")
    twice = f"<|channel|>analysis<|message|>a<|end|>{NEXT}"
    assert not accepts(compiler, grammar, f"{twice}{twice}{FINAL}")
    assert answer_grammar(DIALECT).of(None, "", Opening.BEHIND_REASONING, 3) == ""


def test_an_answer_of_a_shape_is_in_its_channel(compiler):
    shape = 'start: "yes" | "no"\n'
    grammar = answer_grammar(DIALECT).of(None, shape, Opening.ANYWHERE, None)
    assert accepts(compiler, grammar, f"{THOUGHT}{NEXT}<|channel|>final<|message|>yes")
    assert not accepts(compiler, grammar, f"{THOUGHT}{NEXT}<|channel|>final<|message|>maybe")
    assert not accepts(compiler, grammar, "yes")
    assert accepts(compiler, answer_grammar(DIALECT).of(None, shape, Opening.BEHIND_REASONING, None), "no")
    called = answer_grammar(DIALECT).of(Calls(TOOLS), shape, Opening.ANYWHERE, None)
    assert accepts(compiler, called, CALLS["bare"].replace(ARGUMENTS, '{"city": "Rome"}'))


@pytest.mark.parametrize(
    ("prompt", "opening"),
    [
        ("<|end|><|start|>assistant", Opening.ANYWHERE),
        ("<|start|>assistant<|channel|>analysis<|message|>\n", Opening.IN_REASONING),
        ("<|start|>assistant<|channel|>final<|message|>", Opening.BEHIND_REASONING),
        ("<|start|>assistant<|channel|>final<|message|>It is", Opening.BEHIND_REASONING),
    ],
)
def test_a_prompt_tells_where_its_answer_begins(prompt, opening):
    assert Opening.of(prompt, DIALECT) is opening
