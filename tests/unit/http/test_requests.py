"""Translation of the fields of OpenAI's requests, and the messages about wrong ones."""

from __future__ import annotations

import json
import math
from typing import Any

import grpc
import pytest

from scalellm.services.common.errors import StatusError
from scalellm.services.tokenizer.http.api_request import param_of, renamed
from scalellm.services.tokenizer.http.chat_request import ChatRequest
from scalellm.services.tokenizer.http.completion_request import CompletionRequest, split_prompts
from scalellm.services.tokenizer.limits import RequestLimits
from scalellm.services.tokenizer.structure import grammar_of
from scalellm.services.tokenizer.validation import validate_generate
from scalellm.v1 import generation_pb2

LIMITS = RequestLimits()
VOCAB = 1000
HELLO = [{"role": "user", "content": "Hi"}]


JSON = {"type": "json_object"}


def schema_format(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "s", "strict": True, "schema": schema}}


def check(request: generation_pb2.GenerateRequest) -> None:
    """Look at a request as the request path does."""
    validate_generate(request, LIMITS, VOCAB)
    if request.HasField("structured_output"):
        grammar_of(request.structured_output, {})


def chat(is_strict: bool = False, **fields: Any) -> generation_pb2.GenerateRequest:
    """Return the request as the request path gets it, after its own checks."""
    request = ChatRequest.read({"messages": HELLO, **fields}, is_strict=is_strict)
    (made,) = request.requests("id", content_is_text=True)
    try:
        check(made)
    except StatusError as error:
        raise renamed(error, request.names) from None
    return made


def complete(is_strict: bool = False, **fields: Any) -> list[generation_pb2.GenerateRequest]:
    request = CompletionRequest.read({"prompt": "Hi", **fields}, is_strict=is_strict)
    made = request.requests("id", split_prompts(request.prompt, LIMITS))
    for number, one in enumerate(made):
        try:
            check(one)
        except StatusError as error:
            raise renamed(error, request.names(number)) from None
    return made


def refusal(call: Any, **fields: Any) -> StatusError:
    with pytest.raises(StatusError) as caught:
        call(**fields)
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.message.startswith(f"{caught.value.field}: ")
    return caught.value


def test_every_field_of_a_chat_has_its_place() -> None:
    made = chat(
        model="m",
        max_completion_tokens=7,
        n=2,
        temperature=0,
        top_p=0.5,
        top_k=3,
        min_p=0.25,
        presence_penalty=1,
        frequency_penalty=-1.5,
        repetition_penalty=1.25,
        logit_bias={"5": -100, "6": 1.5},
        logprobs=True,
        top_logprobs=4,
        seed=-1,
        stop=["a", "b"],
        stop_token_ids=[1, 2],
        min_tokens=3,
        ignore_eos=True,
        skip_special_tokens=False,
        include_stop_str_in_output=True,
        add_generation_prompt=True,
        prompt_logprobs=2,
        priority=5,
        request_id="mine",
        stream_interval=9,
        cache_salt="salt",
        user="u",
        metadata={"a": "b"},
        store=True,
    )
    sampling = made.sampling
    assert (sampling.max_tokens, sampling.n, sampling.temperature, sampling.top_p) == (7, 2, 0, 0.5)
    assert sampling.HasField("temperature")
    assert (sampling.top_k, sampling.min_p, sampling.presence_penalty) == (3, 0.25, 1)
    assert (sampling.frequency_penalty, sampling.repetition_penalty) == (-1.5, 1.25)
    assert {entry.token_id: entry.bias for entry in sampling.logit_bias} == {5: -100, 6: 1.5}
    assert (sampling.logprobs, sampling.prompt_logprobs, sampling.seed) == (4, 2, 2**64 - 1)
    assert (list(sampling.stop_token_ids), sampling.min_tokens, sampling.ignore_eos) == ([1, 2], 3, True)
    assert (list(made.stop), made.include_stop, made.skip_special_tokens) == (["a", "b"], True, False)
    assert (made.priority, made.request_id, made.stream_interval, made.cache_salt) == (5, "mine", 9, "salt")
    assert made.chat.add_generation_prompt
    assert made.output == generation_pb2.OUTPUT_TEXT_AND_TOKEN_IDS


def test_what_goes_to_the_template() -> None:
    made = chat(
        chat_template_kwargs={"enable_thinking": False, "é": [1]},
        reasoning_effort="low",
        continue_final_message=True,
        add_generation_prompt=False,
        return_token_ids=True,
    )
    assert json.loads(made.chat.template_kwargs) == {"enable_thinking": False, "é": [1]}
    assert made.reasoning.effort == "low"
    assert made.chat.continue_final_message
    assert not made.chat.add_generation_prompt
    assert made.return_prompt_token_ids
    assert not chat(chat_template_kwargs={}).chat.template_kwargs
    same = chat(chat_template_kwargs={"reasoning_effort": "low"}, reasoning_effort="low")
    assert json.loads(same.chat.template_kwargs) == {"reasoning_effort": "low"}


@pytest.mark.parametrize(
    ("last", "fields", "echoed"),
    [
        ("assistant", {}, ""),
        ("assistant", {"echo": True}, "Hi"),
        ("assistant", {"echo": True, "continue_final_message": True}, "Hi"),
        ("user", {"echo": True}, ""),
        ("user", {"echo": True, "add_generation_prompt": False}, "Hi"),
        ("user", {"echo": True, "continue_final_message": True}, "Hi"),
    ],
)
def test_echo_is_of_the_one_who_answers(last: str, fields: dict[str, Any], echoed: str) -> None:
    request = ChatRequest.read({"messages": [{"role": last, "content": "Hi"}], **fields}, is_strict=True)
    (made,) = request.requests("id", content_is_text=True)
    assert request.echoed(made.chat) == echoed


@pytest.mark.parametrize(
    "content", ["x = 1\ny = 2", [{"type": "text", "text": "x = 1"}, {"type": "text", "text": "y = 2"}]]
)
def test_a_prediction_is_text(content: Any) -> None:
    assert chat(is_strict=True, prediction={"type": "content", "content": content}).prediction == "x = 1\ny = 2"
    assert not chat().HasField("prediction")


def test_null_is_no_value() -> None:
    names = [name for name in ChatRequest.model_fields if name != "messages"]
    assert chat(**dict.fromkeys([*names, *ChatRequest.refused, *ChatRequest.ignored])) == chat()
    names = [name for name in CompletionRequest.model_fields if name != "prompt"]
    assert complete(**dict.fromkeys([*names, *CompletionRequest.refused])) == complete()


def test_contents_are_text() -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [], "refusal": None},
        {"role": "user", "content": "", "name": "ada"},
    ]
    made = chat(messages=messages)
    said = [(message.role, message.content) for message in made.chat.messages]
    assert said == [("system", "Be brief."), ("user", "a\nb"), ("assistant", ""), ("user", "")]
    assert made.chat.content_is_text


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": ["Hi"]}, "messages[0]"),
        ({"messages": [*HELLO, {"content": "a"}]}, "messages[1].role"),
        ({"messages": [{"role": "", "content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": "r" * 65, "content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": []}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "tool_calls": [{"id": "x"}]}]}, "messages[0].tool_calls[0].function"),
        ({"messages": HELLO * 1025}, "messages"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"a": "\ud800"}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"a": "a" * 2**14}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"reasoning_effort": "low"}, "reasoning_effort": "high"}, "reasoning_effort"),
        ({"reasoning_effort": 1}, "reasoning_effort"),
        ({"reasoning_effort": "\ud800"}, "reasoning_effort"),
        ({"reasoning_effort": "a" * 2**14}, "reasoning_effort"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"continue_final_message": True, "session_id": "s"}, "continue_final_message"),
        ({"add_generation_prompt": False, "session_id": "s"}, "add_generation_prompt"),
        ({"prediction": "x = 1"}, "prediction"),
        ({"prediction": {"type": "text", "content": "x"}}, "prediction.type"),
        ({"prediction": {"type": "content", "content": 5}}, "prediction.content"),
        ({"prediction": {"type": "content", "content": [{"type": "image_url"}]}}, "prediction.content[0].type"),
        ({"prediction": {"type": "content", "content": "a" * (2**16 + 1)}}, "prediction"),
        ({"echo": "yes"}, "echo"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": -0.5}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": True}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"n": 2**32}, "n"),
        ({"n": 1.5}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"seed": 2**64}, "seed"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"\u0663": 1}}, "logit_bias"),
        ({"logit_bias": {"5": "1"}}, "logit_bias.5"),
        ({"logit_bias": {"5": 101}}, "logit_bias[0].bias"),
        ({"logit_bias": {str(VOCAB): 1}}, "logit_bias[0].token_id"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
        ({"stop": 5}, "stop"),
        ({"stop": [5]}, "stop[0]"),
        ({"stop": [""]}, "stop[0]"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop_token_ids": [VOCAB]}, "stop_token_ids[0]"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids[0]"),
        ({"logprobs": 3}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"request_id": "a b"}, "request_id"),
        ({"session_id": "a b"}, "session_id"),
        ({"session_id": "a", "n": 2}, "n"),
        ({"priority": 101}, "priority"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": []}, "stream_options"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"stream_interval": 0}, "stream_interval"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"functions": [{}]}, "functions"),
        ({"function_call": {"name": "f"}}, "function_call"),
        ({"response_format": 3}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.schema"),
        ({"response_format": schema_format(3)}, "response_format.json_schema.schema"),
        ({"response_format": schema_format({"not": {}})}, "response_format.json_schema.schema"),
        ({"response_format": JSON, "structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"audio": {}}, "audio"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"guided_json": {"not": {}}}, "guided_json"),
        ({"guided_choice": "a"}, "guided_choice"),
        ({"guided_choice": ["a", ""]}, "guided_choice[1]"),
        ({"guided_regex": ""}, "guided_regex"),
        ({"guided_grammar": "root ::= 'a'"}, "guided_grammar"),
        ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs"),
        ({"structured_outputs": {"regex": 3}}, "structured_outputs.regex"),
        ({"structured_outputs": {"xml": "a"}}, "structured_outputs.xml"),
        ({"structured_outputs": {"regex": "a", "whitespace_pattern": " "}}, "structured_outputs.whitespace_pattern"),
        ({"structured_outputs": {"structural_tag": "{"}}, "structured_outputs.structural_tag"),
        (
            {"structured_outputs": {"structural_tag": {"structures": [{"begin": "a"}], "triggers": ["b"]}}},
            "structured_outputs.structural_tag.structures[0].begin",
        ),
    ],
)
def test_a_refusal_of_a_chat_names_its_field(fields: dict[str, Any], param: str) -> None:
    assert refusal(chat, **fields).field == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": "\udfff"}, "prompt"),
        ({"prompt": ["a", 5]}, "prompt[1]"),
        ({"prompt": ["a", "\udfff"]}, "prompt[1]"),
        ({"prompt": [1, "a"]}, "prompt[1]"),
        ({"prompt": [1, True]}, "prompt[1]"),
        ({"prompt": [1, -1]}, "prompt[1]"),
        ({"prompt": [1, VOCAB]}, "prompt[1]"),
        ({"prompt": [[1], [2, VOCAB]]}, "prompt[1][1]"),
        ({"prompt": [[1], []]}, "prompt[1]"),
        ({"prompt": "a" * (2**20 + 1)}, "prompt"),
        ({"prompt": ["a"] * 257}, "prompt"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"best_of": 2}, "best_of"),
        ({"best_of": 3, "n": 2}, "best_of"),
        ({"suffix": "the end"}, "suffix"),
        ({"echo": "yes"}, "echo"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
def test_a_refusal_of_a_completion_names_its_field(fields: dict[str, Any], param: str) -> None:
    assert refusal(complete, **fields).field == param


def test_values_that_change_nothing_are_taken() -> None:
    assert chat(tools=[], tool_choice="auto", response_format={"type": "text"}, modalities=["text"]) == chat()
    assert complete(suffix="", best_of=1, use_beam_search=False) == complete()


@pytest.mark.parametrize(
    ("fields", "shape"),
    [
        ({"response_format": JSON}, {"json_object": {}}),
        ({"response_format": schema_format({"type": "null"})}, {"json_schema": '{"type": "null"}'}),
        ({"structured_outputs": {"json": {"type": "null"}}}, {"json_schema": '{"type": "null"}'}),
        ({"structured_outputs": {"json": '{"type":"null"}'}}, {"json_schema": '{"type":"null"}'}),
        ({"structured_outputs": {"json_object": True, "disable_fallback": True}}, {"json_object": {}}),
        ({"structured_outputs": {"regex": "a+", "json_object": False}}, {"regex": "a+"}),
        ({"structured_outputs": {"choice": ["a", "b"]}}, {"choice": {"texts": ["a", "b"]}}),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, {"lark": 'start: "a"'}),
        ({"guided_json": True}, {"json_schema": "true"}),
        ({"guided_regex": "a"}, {"regex": "a"}),
        ({"guided_choice": ["a"]}, {"choice": {"texts": ["a"]}}),
        ({"guided_grammar": "start: /a/"}, {"lark": "start: /a/"}),
        (
            {
                "structured_outputs": {
                    "structural_tag": json.dumps(
                        {"structures": [{"begin": "<f>", "schema": {}, "end": "</f>"}], "triggers": ["<f"]}
                    )
                }
            },
            {
                "structural_tag": {
                    "structures": [{"begin": "<f>", "json_schema": "{}", "end": "</f>"}],
                    "triggers": ["<f"],
                }
            },
        ),
    ],
)
def test_shapes_in_all_forms(fields: dict[str, Any], shape: dict[str, Any]) -> None:
    wire = generation_pb2.StructuredOutput(**shape)
    assert chat(**fields).structured_output == wire
    assert complete(**fields)[0].structured_output == wire


def test_unknown_fields_are_left_alone_or_refused() -> None:
    assert chat(later_invention=1) == chat()
    assert refusal(chat, is_strict=True, later_invention=1).field == "later_invention"
    assert chat(is_strict=True, user="u", verbosity="low") == chat()
    assert refusal(complete, is_strict=True, messages=[]).field == "messages"


def test_prompts_in_all_forms() -> None:
    (one,) = complete(prompt="Hi")
    assert (one.prompt, one.request_id, one.sampling.max_tokens) == ("Hi", "id", 16)
    (one,) = complete(prompt=[1, 2, 3], max_tokens=5)
    assert (list(one.tokens.ids), one.sampling.max_tokens) == ([1, 2, 3], 5)
    (one,) = complete(prompt=["Hi"])
    assert (one.prompt, one.request_id) == ("Hi", "id")
    two = complete(prompt=["a", [1]])
    assert [(request.prompt, list(request.tokens.ids), request.request_id) for request in two] == [
        ("a", [], "id-0"),
        ("", [1], "id-1"),
    ]


def test_the_prompt_alone_costs_one_token_that_nobody_sees() -> None:
    (one,) = complete(prompt=[1, 2], echo=True, logprobs=1, max_tokens=0, min_tokens=0)
    assert (one.sampling.max_tokens, one.sampling.prompt_logprobs, one.sampling.logprobs) == (1, 1, 1)


@pytest.mark.parametrize(
    ("field", "param"),
    [
        ("sampling.top_p", "top_p"),
        ("sampling.logit_bias[3].bias", "logit_bias[3].bias"),
        ("chat.messages[2].content", "messages[2].content"),
        ("chat.content_is_text", "messages.content_is_text"),
        ("chat.template_kwargs", "chat_template_kwargs"),
        ("tokens.ids[7]", "prompt[7]"),
        ("include_stop", "include_stop_str_in_output"),
        ("stop[1]", "stop[1]"),
        ("", ""),
    ],
)
def test_fields_have_the_clients_names(field: str, param: str) -> None:
    assert param_of(field, {}) == param
