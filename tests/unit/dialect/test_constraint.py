"""Every text that a tool grammar allows is read as calls of the tools, with arguments of their schemas."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator

import jsonschema
import pytest

from dialect_kit import accepts, answer_grammar, draw, make_compiler, split
from scalellm.services.common.errors import StatusError
from scalellm.services.executor.grammar import LlGrammarCompiler
from scalellm.services.tokenizer.dialect import Dialect, JsonArguments, Marks, PartKind, TaggedArguments
from scalellm.services.tokenizer.dialect import known as formats
from scalellm.services.tokenizer.dialect.calls import CalledTool, Calls
from scalellm.services.tokenizer.dialect.opening import Opening

THINK = Marks("<think>", "</think>")
FORMATS = {
    name: getattr(formats, name)
    for name in ("DEEPSEEK", "DEEPSEEK_V31", "GLM", "HERMES", "KIMI", "LLAMA_JSON", "MISTRAL_ARGS", "MISTRAL_LIST",
                 "PYTHONIC", "QWEN_CODER")
}  # fmt: skip
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Paris", "Rome"]},
        "days": {"$ref": "#/$defs/days"},
        "hourly": {"type": "boolean"},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
    "$defs": {"days": {"type": "integer", "minimum": 1, "maximum": 7}},
}
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
SCHEMAS = {"get_weather": WEATHER, "get": NOTHING}
TOOLS = [CalledTool(name, json.dumps(schema), f"tools.{name}") for name, schema in SCHEMAS.items()]
TEXTS = {"get_weather": {"city": True}}


@pytest.fixture(scope="module")
def compiler() -> Iterator[LlGrammarCompiler]:
    made = make_compiler()
    yield made
    made.close()


@pytest.mark.parametrize("opening", [Opening.ANYWHERE, Opening.IN_REASONING, Opening.BEHIND_REASONING])
@pytest.mark.parametrize("name", FORMATS)
def test_whatever_is_drawn_is_a_call(compiler, name, opening):
    dialect = Dialect(THINK, FORMATS[name])
    calls = Calls(TOOLS, are_required=True, is_single=opening is Opening.ANYWHERE)
    grammar = answer_grammar(dialect).of(calls, "", opening, 6)
    for seed in range(4):
        text = draw(compiler, grammar, random.Random(seed))
        parts = split(dialect, list(text), opening, texts=TEXTS)
        called = [part for part in parts if part.kind is PartKind.CALL]
        assert called, text
        assert {part.kind for part in parts} <= {PartKind.CALL, PartKind.REASONING}
        assert len(called) == 1 or not calls.is_single
        for part in called:
            jsonschema.validate(json.loads(part.text), SCHEMAS[part.name])


@pytest.mark.parametrize("name", FORMATS)
def test_as_the_model_likes(compiler, name):
    written = FORMATS[name]
    dialect = Dialect(None, written)
    grammar = answer_grammar(dialect).of(Calls(TOOLS), "", Opening.ANYWHERE, None)
    arguments = "{}" if isinstance(written.arguments, JsonArguments) else ""
    number = ":0" if written.is_numbered else ""
    call = f"get{number}{written.between}{arguments}{written.after}"
    other = f"gut{number}{written.between}{arguments}{written.after}"
    before = "" if written.is_whole else "I look. "
    after = "" if written.is_whole else "\nSo."
    assert accepts(compiler, grammar, "")
    assert accepts(compiler, grammar, "No call { or [ < here.")
    assert accepts(compiler, grammar, f"{before}{written.opening}{call}{written.end}{after}")
    two = f"{written.opening}{call}{written.separator}{written.before}{call}{written.end}"
    assert accepts(compiler, grammar, before + two)
    assert not accepts(compiler, grammar, f"{before}{written.opening}{other}{written.end}")
    assert not accepts(compiler, grammar, f"{before}{written.trigger}")
    single = answer_grammar(dialect).of(Calls(TOOLS, is_single=True), "", Opening.ANYWHERE, None)
    assert accepts(compiler, single, f"{before}{written.opening}{call}{written.end}")
    assert not accepts(compiler, single, before + two)


@pytest.mark.parametrize("budget", [0, 3])
def test_reasoning_ends_with_its_budget(compiler, budget):
    dialect = Dialect(THINK, formats.HERMES)
    for calls, answer in (
        (None, "Yes."),
        (Calls(TOOLS), "Yes."),
        (Calls(TOOLS, are_required=True), '<tool_call>\n{"name": "get", "arguments": {}}\n</tool_call>'),
    ):
        open_ended = answer_grammar(dialect).of(calls, "", Opening.IN_REASONING, budget)
        assert accepts(compiler, open_ended, "a" * budget + f"</think>\n\n{answer}")
        assert not accepts(compiler, open_ended, "a" * (budget + 1) + f"</think>\n\n{answer}")
        optional = answer_grammar(dialect).of(calls, "", Opening.ANYWHERE, budget)
        assert accepts(compiler, optional, answer)
        assert accepts(compiler, optional, "<think>" + "a" * budget + f"</think>{answer}")
        behind = answer_grammar(dialect).of(calls, "", Opening.BEHIND_REASONING, budget)
        assert (behind == "") == (calls is None)


@pytest.mark.parametrize("mark", ["</think>", "<eos>"])
def test_reasoning_is_bounded_in_every_place(compiler, mark):
    grammar = answer_grammar(Dialect(THINK)).of(None, "", Opening.ANYWHERE, 3)
    assert accepts(compiler, grammar, "<think>aaa</think>b" + "b" * 20)
    assert not accepts(compiler, grammar, f"<think>aaaa{mark}")


def test_an_answer_of_a_shape_follows_the_reasoning(compiler):
    shape = 'start: "yes" | "no"\n'
    dialect = Dialect(THINK, formats.HERMES)
    bare = answer_grammar(dialect).of(None, shape, Opening.ANYWHERE, None)
    assert accepts(compiler, bare, "yes")
    assert accepts(compiler, bare, "<think>\nHm.</think>\n\nno")
    assert not accepts(compiler, bare, "<think>\nHm.</think>\n\nperhaps")
    called = answer_grammar(dialect).of(Calls(TOOLS), shape, Opening.IN_REASONING, None)
    assert accepts(compiler, called, "Hm.</think>no")
    assert accepts(compiler, called, 'Hm.</think>\n<tool_call>\n{"name": "get", "arguments": {}}\n</tool_call>')
    assert not accepts(compiler, called, "no")


@pytest.mark.parametrize("name", ["GLM", "QWEN_CODER"])
def test_texts_between_tags(compiler, name):
    written = FORMATS[name]
    tags = written.arguments
    assert isinstance(tags, TaggedArguments)
    schema = {"type": "object", "properties": {"note": {"type": "string"}, "n": {"type": "integer"}}}
    dialect = Dialect(None, written)
    grammar = answer_grammar(dialect).of(
        Calls([CalledTool("f", json.dumps(schema), "f"), CalledTool("any", None, "any")], are_required=True),
        "", Opening.ANYWHERE, None,
    )  # fmt: skip

    def answer(tool: str, *arguments: tuple[str, str]) -> str:
        inner = "".join(f"{tags.before}{key}{tags.between}{value}{tags.after}" for key, value in arguments)
        return f"{written.opening}{tool}{written.between}{inner}{written.after}{written.end}"

    text = answer("f", ("note", 'two\nlines "</x>'), ("n", "3"))
    assert accepts(compiler, grammar, text)
    (part,) = split(dialect, list(text), texts={"f": {"note": True, "n": False}})
    assert json.loads(part.text) == {"note": 'two\nlines "</x>', "n": 3}
    assert accepts(compiler, grammar, answer("f"))
    assert accepts(compiler, grammar, answer("any", ("what", "ever"), ("n", "x")))
    assert not accepts(compiler, grammar, answer("f", ("n", "x")))
    assert not accepts(compiler, grammar, answer("f", ("other", "3")))


def test_arguments_as_python_writes_them(compiler):
    schema = {
        "type": "object",
        "properties": {
            "flag": {"type": ["boolean", "null"]},
            "note": {"type": "string"},
            "kind": {"const": "it's"},
            "code": {"type": "string", "pattern": "^[a-z]+$"},
            "l": {"type": "array", "items": {"type": "integer"}},
        },
        "required": ["note"],
        "additionalProperties": False,
    }
    tools = [CalledTool("f", json.dumps(schema), "f"), CalledTool("any", None, "any")]
    grammar = answer_grammar(Dialect(None, formats.PYTHONIC)).of(
        Calls(tools, are_required=True), "", Opening.ANYWHERE, None
    )
    for arguments, read in (
        ("flag=True, note='it\\'s \"so\"', l=[1, 2]", {"flag": True, "note": 'it\'s "so"', "l": [1, 2]}),
        ("flag=None, note=\"a\", kind='it\\'s'", {"flag": None, "note": "a", "kind": "it's"}),
        ('flag=true, note="", code="x"', {"flag": True, "note": "", "code": "x"}),
        ("note='', kind=\"it's\"", {"note": "", "kind": "it's"}),
    ):
        assert accepts(compiler, grammar, f"[f({arguments})]")
        (part,) = split(Dialect(None, formats.PYTHONIC), list(f"[f({arguments})]"))
        assert json.loads(part.text) == read
        jsonschema.validate(read, schema)
    for wrong in ("", "flag=True", "note=1", "note='a', code='X'", "note='a',l=[1]", "note='a', x=1", "note='a"):
        assert not accepts(compiler, grammar, f"[f({wrong})]")
    assert accepts(compiler, grammar, "[any(a={'b': [True, None, 'c', \"d\"]}, e=-1.5), any(), f(note='')]")


@pytest.mark.parametrize("text", [" [1] is it", "\n[", "[", "[f(x"])
def test_a_text_that_is_no_call_begins_with_no_bracket(compiler, text):
    grammar = answer_grammar(Dialect(None, formats.PYTHONIC)).of(Calls(TOOLS), "", Opening.ANYWHERE, None)
    assert not accepts(compiler, grammar, text)
    assert accepts(compiler, grammar, f"See{text}")


@pytest.mark.parametrize(
    ("name", "schema", "says"),
    [
        ("PYTHONIC", {"type": "object", "properties": {"a-b": {}}}, "'a-b'"),
        ("PYTHONIC", {"type": "object", "properties": {"a": {"not": {}}}}, "'not'"),
        ("HERMES", {"type": "object", "uniqueItems": True}, "'uniqueItems'"),
        ("GLM", {"type": "object", "properties": {"a": {"type": "string", "pattern": "x"}}}, "'pattern'"),
        ("GLM", {"type": "object", "anyOf": [{}]}, "'anyOf'"),
        ("QWEN_CODER", {"type": "object", "properties": {"a": {"contains": {}}}}, "'contains'"),
    ],
)
def test_what_calls_cannot_follow_is_named(name, schema, says):
    calls = Calls([CalledTool("f", json.dumps(schema), "chat.tools[0].parameters")])
    with pytest.raises(StatusError, match=says) as caught:
        answer_grammar(Dialect(None, FORMATS[name])).of(calls, "", Opening.ANYWHERE, None)
    assert caught.value.field == "chat.tools[0].parameters"
