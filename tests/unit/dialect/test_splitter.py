"""Answers in every dialect, cut in every way: the same reasoning, text and calls come out."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dialect_kit import split, told
from scalellm.services.tokenizer.dialect import Dialect, Marks, PartKind
from scalellm.services.tokenizer.dialect.known import (
    DEEPSEEK,
    DEEPSEEK_V31,
    GLM,
    HERMES,
    KIMI,
    LLAMA_JSON,
    MISTRAL_ARGS,
    MISTRAL_LIST,
    PYTHONIC,
    QWEN_CODER,
)
from scalellm.services.tokenizer.dialect.opening import Opening

THINK = Marks("<think>", "</think>")

CITY = '{"city": "Pa}r\\"is", "l": [1, {}]}'
TWO_CALLS = {
    "hermes": (
        HERMES,
        f'<tool_call>\n{{"name": "get", "arguments": {CITY}}}\n</tool_call>\n'
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
    ),
    "mistral list": (
        MISTRAL_LIST,
        f'[TOOL_CALLS] [{{"name": "get", "arguments": {CITY}}}, {{"name": "now", "arguments": {{}}}}]',
    ),
    "mistral": (MISTRAL_ARGS, f"[TOOL_CALLS]get[ARGS]{CITY}[TOOL_CALLS]now[ARGS]{{}}"),
    "llama": (LLAMA_JSON, f'{{"name": "get", "parameters": {CITY}}}; {{"name": "now", "parameters": {{}}}}'),
    "deepseek": (
        DEEPSEEK,
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get\n```json\n"
        f"{CITY}\n```<｜tool▁call▁end｜>\n"
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    ),
    "deepseek 3.1": (
        DEEPSEEK_V31,
        f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get<｜tool▁sep｜>{CITY}<｜tool▁call▁end｜>"
        "<｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    ),
    "kimi": (
        KIMI,
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.get:0<|tool_call_argument_begin|>"
        f"{CITY}<|tool_call_end|><|tool_call_begin|>functions.now:1<|tool_call_argument_begin|>"
        "{}<|tool_call_end|><|tool_calls_section_end|>",
    ),
    "qwen coder": (
        QWEN_CODER,
        "<tool_call>\n<function=get>\n"
        '<parameter=city>\nPa}r"is\n</parameter>\n<parameter=l>\n[1, {}]\n</parameter>\n'
        "</function>\n</tool_call>\n<tool_call>\n<function=now>\n</function>\n</tool_call>",
    ),
    "glm": (
        GLM,
        '<tool_call>get\n<arg_key>city</arg_key>\n<arg_value>Pa}r"is</arg_value>\n'
        "<arg_key>l</arg_key>\n<arg_value>[1, {}]</arg_value>\n</tool_call>\n<tool_call>now\n</tool_call>",
    ),
}
TWO_CALLS["python"] = (PYTHONIC, """[get(city='Pa}r"is', l=[1, {}]), now()]""")
NUMBERED = "functions."


@pytest.mark.parametrize("name", TWO_CALLS)
def test_calls_come_out_as_they_were_meant(name):
    calls, text = TWO_CALLS[name]
    parts = split(Dialect(THINK, calls), [text])
    assert [part.name for part in parts] == ["get", "now"]
    assert [json.loads(part.text) for part in parts] == [{"city": 'Pa}r"is', "l": [1, {}]}, {}]
    assert [part.number for part in parts] == [0, 1]
    ids = ["functions.get:0", "functions.now:1"] if calls.is_numbered else ["id0", "id1"]
    assert [part.call_id for part in parts] == ids


@given(
    name=st.sampled_from(sorted(TWO_CALLS)),
    before=st.sampled_from(["", "<think>\nSo <tool_call> it \n</think>\n\n", "<think></think>", "\n <think> a"]),
    text=st.sampled_from(["", "Let me look.\n", "a < b </ [TOOL ", "{", "<tool_call", "\n\n", "é 😀 <｜tool"]),
    after=st.sampled_from(["", "\n", "\nDone. ", " <tool_call>"]),
    opening=st.sampled_from(Opening),
    has_calls=st.booleans(),
    data=st.data(),
)
def test_every_way_to_cut_a_text_yields_the_same(name, before, text, after, opening, has_calls, data):
    calls, written = TWO_CALLS[name]
    whole = before + text + written + after
    whole = whole[: data.draw(st.one_of(st.just(len(whole)), st.integers(0, len(whole))))]
    cuts = sorted(data.draw(st.sets(st.integers(0, len(whole)), max_size=12)))
    pieces = [whole[start:end] for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    dialect = Dialect(THINK, calls)
    at_once = split(dialect, [whole], opening, has_calls=has_calls)
    assert split(dialect, pieces, opening, has_calls=has_calls) == at_once
    assert split(dialect, list(whole), opening, has_calls=has_calls) == at_once


@given(text=st.text("<think/>tol_c{\n ", max_size=40))
def test_where_nothing_is_told_apart_all_is_text(text):
    parts = split(Dialect(), list(text), has_calls=False)
    assert "".join(part.text for part in parts) == text
    assert {part.kind for part in parts} <= {PartKind.TEXT}


@pytest.mark.parametrize(
    ("text", "opening", "expected"),
    [
        ("<think>\nHm.\n</think>\n\nYes. ", Opening.ANYWHERE, [("reasoning", "Hm."), ("text", "Yes. ")]),
        (" Hm.\n</think>\n\nYes.", Opening.IN_REASONING, [("reasoning", "Hm."), ("text", "Yes.")]),
        ("<think>Hm.</think>Yes.", Opening.IN_REASONING, [("reasoning", "Hm."), ("text", "Yes.")]),
        ("Hm", Opening.IN_REASONING, [("reasoning", "Hm")]),
        ("</think> No", Opening.BEHIND_REASONING, [("text", "</think> No")]),
        ("\n Yes. <think>", Opening.ANYWHERE, [("text", "\n Yes. <think>")]),
        ("<thin", Opening.ANYWHERE, [("text", "<thin")]),
        ("<think></think>", Opening.ANYWHERE, []),
    ],
)
def test_reasoning_comes_first(text, opening, expected):
    assert told(split(Dialect(THINK), list(text), opening)) == expected


def test_text_stands_around_calls_without_the_white_space():
    call = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    parts = split(Dialect(None, HERMES), list(f"I look.\n\n{call}\nSo. {call}"))
    assert told(parts) == [("text", "I look."), ("now", "{}"), ("text", "So."), ("now", "{}")]


@pytest.mark.parametrize("name", TWO_CALLS)
def test_a_call_that_is_cut_off_is_no_text(name):
    calls, text = TWO_CALLS[name]
    for end in range(len(calls.trigger), len(text)):
        parts = split(Dialect(None, calls), [text[:end]])
        assert {part.kind for part in parts} <= {PartKind.CALL}


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("True", "true"),
        ("[False, None, 1.5, 'a', \"b\"]", '[false, null, 1.5, "a", "b"]'),
        ("{'it\\'s': 'True, \\\\ (None)'}", '{"it\'s": "True, \\\\ (None)"}'),
        ("true", "true"),
        ("red", '"red"'),
        ("NaN", '"NaN"'),
        ("Trueish", '"Trueish"'),
    ],
)
def test_values_of_python_are_told_as_json(written, expected):
    text = f"[f(a={written}, b=2)]"
    (part,) = split(Dialect(None, PYTHONIC), list(text))
    assert part.text == f'{{"a": {expected}, "b": 2}}'
    json.loads(part.text)


def test_values_are_what_their_schema_says():
    text = TWO_CALLS["glm"][1].replace("[1, {}]", "007").replace('Pa}r"is', "12")
    as_texts = split(Dialect(None, GLM), [text], texts={"get": {"city": True, "l": True}})
    assert json.loads(as_texts[0].text) == {"city": "12", "l": "007"}
    as_found = split(Dialect(None, GLM), [text])
    assert json.loads(as_found[0].text) == {"city": 12, "l": "007"}
