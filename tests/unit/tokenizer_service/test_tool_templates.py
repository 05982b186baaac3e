"""Tools, calls, results and documents reach a template as transformers gives them to it."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import _compile_jinja_template

from scalellm.services.tokenizer.dialect import dialect_of
from scalellm.services.tokenizer.dialect import known as formats
from scalellm.services.tokenizer.message import FunctionCall, Message, for_template
from scalellm.services.tokenizer.prompt_builder import PromptBuilder
from scalellm.services.tokenizer.text.model_tokenizer import ModelTokenizer
from scalellm.v1 import generation_pb2
from tool_templates import TEMPLATES

FORMATS = {
    "hermes": formats.HERMES,
    "qwen coder": formats.QWEN_CODER,
    "llama": formats.LLAMA_JSON,
    "mistral list": formats.MISTRAL_LIST,
    "mistral": formats.MISTRAL_ARGS,
    "deepseek": formats.DEEPSEEK,
    "deepseek 3.1": formats.DEEPSEEK_V31,
    "kimi": formats.KIMI,
    "glm": formats.GLM,
    "pythonic": formats.PYTHONIC,
    "harmony": formats.HARMONY,
    "rag": formats.HERMES,
}
AS_SENT = ("deepseek", "deepseek 3.1")
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a town, and <its> é",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    },
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}},
]
CALL = {"id": "abcdef123", "name": "get_weather", "arguments": {"city": "Zürich <1>"}}
DOCUMENTS = [{"title": "Atlas", "text": "Towns."}]


def make_chat(*, has_tools: bool, has_call: bool) -> generation_pb2.Chat:
    chat = generation_pb2.Chat(documents=json.dumps(DOCUMENTS))
    if has_tools:
        for tool in TOOLS:
            function = tool["function"]
            chat.tools.add(
                name=function["name"],
                description=function.get("description", ""),
                parameters=json.dumps(function["parameters"]),
            )
    chat.messages.add(role="user", content="How is it there?")
    if has_call:
        message = chat.messages.add(role="assistant")
        message.tool_calls.add(id=CALL["id"], name=CALL["name"], arguments=json.dumps(CALL["arguments"]))
        chat.messages.add(role="tool", content='{"sky": "grey"}', tool_call_id=CALL["id"])
    return chat


def messages(*, has_call: bool, as_sent: bool) -> list[dict]:
    """Return the chat as transformers takes it: arguments as objects, or as texts where a template wants these."""
    told: list[dict] = [{"role": "user", "content": "How is it there?"}]
    if has_call:
        arguments = json.dumps(CALL["arguments"]) if as_sent else CALL["arguments"]
        function = {"name": CALL["name"], "arguments": arguments}
        call = {"id": CALL["id"], "type": "function", "function": function}
        told.append({"role": "assistant", "content": None if as_sent else "", "tool_calls": [call]})
        result = {"role": "tool", "content": '{"sky": "grey"}', "tool_call_id": CALL["id"], "name": CALL["name"]}
        told.append(result)
    return told


@pytest.mark.parametrize("name", TEMPLATES)
async def test_prompts_are_those_of_transformers(smollm: ModelTokenizer, smollm_oracle: PreTrainedTokenizerFast, name):
    async with PromptBuilder(replace(smollm, chat_templates={"default": TEMPLATES[name]})) as builder:
        for has_tools, has_call in itertools.product((False, True), repeat=2):
            variables = {"tools": TOOLS if has_tools else None, "documents": DOCUMENTS, "add_generation_prompt": True}
            told = messages(has_call=has_call, as_sent=name in AS_SENT)
            if name in AS_SENT and has_call:  # transformers' method leaves out what is null, which these ask for
                template = _compile_jinja_template(TEMPLATES[name])
                read = template.render(messages=told, **variables, **smollm.special_tokens)
            else:
                read = smollm_oracle.apply_chat_template(
                    told, chat_template=TEMPLATES[name], tokenize=False, **variables
                )
            chat = make_chat(has_tools=has_tools, has_call=has_call)
            for is_text in (False, True):
                chat.content_is_text = is_text
                got = (await builder.render(chat, caller="")).plain
                assert got == read, f"{has_tools=}, {has_call=}, {is_text=}"


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_tells_how_calls_are_written(name):
    dialect = dialect_of(TEMPLATES[name])
    assert (dialect.channels or dialect.calls) == FORMATS[name]
    assert dialect.tells_calls
    assert dialect.tells_reasoning == (name == "harmony" or dialect.reasoning is not None)


@pytest.mark.parametrize("name", ["hermes", "mistral", "kimi", "deepseek 3.1", "qwen coder", "pythonic"])
async def test_what_a_template_writes_is_a_call_of_its_dialect(smollm: ModelTokenizer, name):
    written, arguments = FORMATS[name], json.dumps(CALL["arguments"], ensure_ascii=False)
    if name == "qwen coder":
        arguments = "<parameter=city>\nZürich <1>\n</parameter>\n"
    if name == "pythonic":
        arguments = 'city="Zürich <1>"'
    called = "get_weather"
    chat = make_chat(has_tools=True, has_call=True)
    for call in chat.messages[1].tool_calls:
        call.arguments = json.dumps(CALL["arguments"], ensure_ascii=False)
        if name == "kimi":
            call.id, called = "functions.get_weather:0", "get_weather:0"
    async with PromptBuilder(replace(smollm, chat_templates={"default": TEMPLATES[name]})) as builder:
        text = (await builder.render(chat, caller="")).plain
    assert f"{written.opening}{called}{written.between}{arguments}{written.after}{written.end}" in text


@pytest.mark.parametrize("name", ["harmony", "llama"])
def test_several_calls_become_messages_each_before_its_result(name):
    calls = (FunctionCall("a", "get", '{"city": "Rome"}'), FunctionCall("b", "now", "{}"))
    results = [
        Message("tool", "noon", call_id="b"),
        Message("tool", "grey", call_id="a"),
        Message("tool", "?", call_id="c"),
    ]
    asked = Message("assistant", "I look.", reasoning="Both.", calls=calls)
    dialect = dialect_of(TEMPLATES[name])
    told = for_template([asked, *results, Message("user", "So?")], [], dialect)
    called = [
        message["tool_calls"][0]["function"] if "tool_calls" in message else message["content"] for message in told
    ]
    get, now = ({"name": call.name, "arguments": json.loads(call.arguments)} for call in calls)
    assert called == [get, "grey", now, "noon", "?", "So?"]
    assert told[0]["thinking"] == "Both.\nI look."
    assert not told[0]["content"]
    assert told[1]["tool_call_id"] == "a"


async def test_templates_that_know_no_tools_are_told_all_the_same(smollm: ModelTokenizer):
    async with PromptBuilder(smollm) as builder:
        chat = make_chat(has_tools=True, has_call=True)
        text = (await builder.render(chat, caller="")).plain
        chat.tool_choice.mode = generation_pb2.TOOL_CHOICE_MODE_NONE
        without = (await builder.render(chat, caller="")).plain
    for tool in TOOLS:
        assert json.dumps(tool, ensure_ascii=False) in text
    call = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Z\\u00fcrich <1>"}}\n</tool_call>'
    result = '<|im_start|>user\n<tool_response>\n{"sky": "grey"}\n</tool_response><|im_end|>'
    for part in (call, result):
        assert part in text
        assert part in without
    assert "now" not in without


@pytest.mark.parametrize(
    ("effort", "kwargs", "read"),
    [
        ("", {}, "-"),
        ("high", {}, "high"),
        ("none", {}, "noneFalse"),
        ("low", {"reasoning_effort": "high", "enable_thinking": True}, "highTrue"),
    ],
)
async def test_effort_is_a_variable_of_the_template(smollm: ModelTokenizer, effort, kwargs, read):
    template = (
        "{{ reasoning_effort | default('-') }}{{ enable_thinking | default('') }}"
        "{% for message in messages %}{{ message.content }}{% endfor %}"
    )
    chat = generation_pb2.Chat(messages=[generation_pb2.ChatMessage(role="user", content="?")])
    if kwargs:
        chat.template_kwargs = json.dumps(kwargs)
    async with PromptBuilder(replace(smollm, chat_templates={"default": template})) as builder:
        assert (await builder.render(chat, caller="", effort=effort)).plain == f"{read}?"
