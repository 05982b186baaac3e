"""Every public field at its limits, and just beyond them."""

from __future__ import annotations

import json
import math

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scalellm.services.common.errors import StatusError
from scalellm.services.common.field_rules import SAMPLING_LISTS
from scalellm.services.tokenizer.limits import RequestLimits
from scalellm.services.tokenizer.template_kwargs import read_template_kwargs
from scalellm.services.tokenizer.validation import (
    fit_context,
    validate_chat,
    validate_decode,
    validate_encode,
    validate_generate,
    validate_id,
    validate_page_size,
    validate_sampling,
)
from scalellm.v1 import common_pb2, generation_pb2, sessions_pb2, tokenizer_pb2

VOCAB = 1000
LIMITS = RequestLimits()
UP, DOWN = math.inf, -math.inf


def just_beyond(value: float, towards: float) -> float:
    """The next number that float32, the type on the wire, can hold."""
    message = common_pb2.SamplingParams(temperature=value)
    step = abs(value) * 2**-22 or 1e-30
    message.temperature = value + (step if towards == UP else -step)
    return message.temperature


def check_sampling(**fields: object) -> None:
    validate_sampling(common_pb2.SamplingParams(**fields), VOCAB)


def bias(token_id: int, value: float) -> common_pb2.LogitBias:
    return common_pb2.LogitBias(token_id=token_id, bias=value)


# name: accepted values, refused values
SAMPLING = {
    "n": ([1, 16], [0, 17, 2**32 - 1]),
    "max_tokens": ([1, 2**32 - 1], [0]),
    "min_tokens": ([0, 2**32 - 1], []),
    "temperature": ([0, 1e-6, 100], [just_beyond(0, DOWN), just_beyond(100, UP), math.nan, math.inf, -math.inf]),
    "top_k": ([0, 1, 2**32 - 1], []),
    "top_p": ([1e-6, 1], [0, -1, just_beyond(1, UP), math.nan, math.inf]),
    "min_p": ([0, 1], [just_beyond(0, DOWN), just_beyond(1, UP), math.nan]),
    "presence_penalty": ([-2, 0, 2], [just_beyond(-2, DOWN), just_beyond(2, UP), math.nan, -math.inf]),
    "frequency_penalty": ([-2, 0, 2], [just_beyond(-2, DOWN), just_beyond(2, UP), math.nan, math.inf]),
    "repetition_penalty": ([1e-6, 2], [0, -1, just_beyond(2, UP), math.nan]),
    "logit_bias": (
        [[], [bias(0, -100)], [bias(VOCAB - 1, 100)], [bias(token_id, 1) for token_id in range(VOCAB)]],
        [
            [bias(VOCAB, 1)],
            [bias(0, just_beyond(100, UP))],
            [bias(0, just_beyond(-100, DOWN))],
            [bias(0, math.nan)],
            [bias(0, math.inf)],
            [bias(0, 1), bias(0, 1)],
            [bias(0, 1)] * 1025,
        ],
    ),
    "seed": ([0, 2**64 - 1], []),
    "stop_token_ids": ([[], [0, VOCAB - 1], [1] * 64], [[VOCAB], [1] * 65]),
    "ignore_eos": ([True, False], []),
    "logprobs": ([0, 20], [21]),
    "prompt_logprobs": ([0, 20], [21]),
}


def test_the_table_covers_every_field():
    assert set(SAMPLING) == {field.name for field in common_pb2.SamplingParams.DESCRIPTOR.fields}


@pytest.mark.parametrize("name", SAMPLING)
def test_sampling(name):
    accepted, refused = SAMPLING[name]
    for value in accepted:
        check_sampling(**{name: value})
    for value in refused:
        with pytest.raises(StatusError) as error:
            check_sampling(**{name: value})
        assert error.value.code is grpc.StatusCode.INVALID_ARGUMENT
        assert error.value.field.split("[")[0] == f"sampling.{name}"
        assert error.value.message.startswith(f"{error.value.field}: must ")


@given(name=st.sampled_from(["temperature", "top_p", "min_p", "presence_penalty"]), value=st.floats(width=32))
def test_what_is_accepted_is_finite_and_in_range(name, value):
    bounds = {"temperature": (0, 100), "top_p": (0, 1), "min_p": (0, 1), "presence_penalty": (-2, 2)}[name]
    try:
        check_sampling(**{name: value})
    except StatusError:
        assert not (bounds[0] <= value <= bounds[1]) or (name == "top_p" and value == 0)
    else:
        assert bounds[0] <= value <= bounds[1]


def test_min_tokens_needs_room_below_max_tokens():
    check_sampling(min_tokens=5, max_tokens=5)
    with pytest.raises(StatusError, match=r"sampling.min_tokens: must be at most max_tokens \(5\), got 6"):
        check_sampling(min_tokens=6, max_tokens=5)


@pytest.mark.parametrize("value", ["a", "A-z.0_9:x", "x" * 128])
def test_good_ids(value):
    validate_id(value, "request_id")


@pytest.mark.parametrize("value", ["", " ", "a b", "x" * 129, "é", "a\n", "a/b", "{}"])
def test_bad_ids(value):
    with pytest.raises(StatusError, match="request_id: must be 1 to 128 characters"):
        validate_id(value, "request_id")


def test_texts_are_measured_in_bytes():
    small = RequestLimits(max_prompt_bytes=4, max_stop_bytes=4, max_role_bytes=4)
    validate_generate(generation_pb2.GenerateRequest(prompt="éé", stop=["éé"]), small, VOCAB)
    validate_encode(tokenizer_pb2.EncodeRequest(text="éé"), small)
    with pytest.raises(StatusError, match="prompt: must have at most 4 bytes, got 6"):
        validate_generate(generation_pb2.GenerateRequest(prompt="ééé"), small, VOCAB)
    with pytest.raises(StatusError, match=r"stop\[0\]: must have 1 to 4 bytes, got 6"):
        validate_generate(generation_pb2.GenerateRequest(prompt="x", stop=["ééé"]), small, VOCAB)
    with pytest.raises(StatusError, match="text: must have at most 4 bytes, got 6"):
        validate_encode(tokenizer_pb2.EncodeRequest(text="ééé"), small)
    message = generation_pb2.ChatMessage(role="éé", content="x")
    with pytest.raises(StatusError, match="chat.messages: must hold at most 4 bytes of text in all, got 5"):
        validate_chat(generation_pb2.Chat(messages=[message]), small)


def nested(depth: int) -> str:
    return '{"a": ' * depth + "1" + "}" * depth


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ("[]", "must be a JSON object"),
        ("{", "is not JSON"),
        ('{"a": NaN}', "holds NaN, which is not JSON"),
        ('{"a": 1, "a": 2}', "has the key 'a' twice in one object"),
        ('{"a": "\\ud800"}', "holds half of a surrogate pair"),
        ('{"messages": []}', "must not name messages"),
        ('{"add_generation_prompt": false}', "must not name add_generation_prompt"),
        (nested(17), "must be at most 16 levels deep"),
        (f'{{"a": {"[" * 16}{"]" * 16}}}', "must be at most 16 levels deep"),
        (nested(2000), "is nested too deeply|must be at most 16 levels deep"),
        ("{}" + " " * 2**14, "must have at most 16384 bytes, got 16386"),
    ],
)
def test_bad_template_kwargs(kwargs, message):
    chat = generation_pb2.Chat(messages=[generation_pb2.ChatMessage(role="user")], template_kwargs=kwargs)
    with pytest.raises(StatusError, match=f"^chat.template_kwargs: {message}"):
        validate_chat(chat, LIMITS)


@pytest.mark.parametrize(
    "kwargs", ["", "{}", nested(16), '{"enable_thinking": false, "é": [null, 1.5, "\\ud83d\\ude00"]}']
)
def test_good_template_kwargs(kwargs):
    chat = generation_pb2.Chat(messages=[generation_pb2.ChatMessage(role="user")], template_kwargs=kwargs)
    validate_chat(chat, LIMITS)
    assert read_template_kwargs(kwargs) == json.loads(kwargs or "{}")


def test_an_answer_goes_on_with_the_last_message_or_begins_one():
    messages = [generation_pb2.ChatMessage(role="user")]
    validate_chat(generation_pb2.Chat(messages=messages, continue_final_message=True), LIMITS)
    both = generation_pb2.Chat(messages=messages, continue_final_message=True, add_generation_prompt=True)
    with pytest.raises(StatusError, match="chat.continue_final_message: must be false where add_generation_prompt"):
        validate_chat(both, LIMITS)


def test_the_largest_requests_fit_a_message():
    sampling = common_pb2.SamplingParams(
        logit_bias=[bias(2**20 + token_id, 1.5) for token_id in range(SAMPLING_LISTS["logit_bias"].most)],
        stop_token_ids=[2**20] * SAMPLING_LISTS["stop_token_ids"].most,
    )
    stops = ["x" * LIMITS.max_stop_bytes] * LIMITS.max_stops
    role, content = "r" * LIMITS.max_role_bytes, "c" * (LIMITS.max_prompt_bytes // LIMITS.max_messages - 64)
    messages = [generation_pb2.ChatMessage(role=role, content=content)] * LIMITS.max_messages
    inputs = (
        {"prompt": "x" * LIMITS.max_prompt_bytes},
        {"chat": generation_pb2.Chat(messages=messages, template_kwargs=f"{{{' ' * (2**14 - 2)}}}")},
        {"tokens": generation_pb2.TokenIds(ids=[2**21 - 1] * LIMITS.max_token_ids)},
    )
    for given_input in inputs:
        request = generation_pb2.GenerateRequest(request_id="r" * 128, sampling=sampling, stop=stops, **given_input)
        validate_generate(request, LIMITS, 2**21)
        assert request.ByteSize() <= LIMITS.max_request_bytes


def test_decode_limits():
    small = RequestLimits(max_token_ids=3)
    validate_decode(tokenizer_pb2.DecodeRequest(token_ids=[0, VOCAB - 1, 1]), small, VOCAB)
    with pytest.raises(StatusError, match="token_ids: must hold at most 3 token ids, got 4"):
        validate_decode(tokenizer_pb2.DecodeRequest(token_ids=[0] * 4), small, VOCAB)
    with pytest.raises(StatusError, match=r"token_ids\[1\]: must be below the vocabulary size 1000, got 1000"):
        validate_decode(tokenizer_pb2.DecodeRequest(token_ids=[0, VOCAB]), small, VOCAB)


def test_page_size():
    assert validate_page_size(sessions_pb2.ListSessionsRequest(), LIMITS) is None
    assert validate_page_size(sessions_pb2.ListSessionsRequest(page_size=1000), LIMITS) == 1000
    for size in (0, 1001):
        with pytest.raises(StatusError, match=r"page_size: must be in \[1, 1000\]"):
            validate_page_size(sessions_pb2.ListSessionsRequest(page_size=size), LIMITS)


def fit(prompt_tokens: int, **sampling: int) -> int:
    request = generation_pb2.GenerateRequest(prompt="x", sampling=common_pb2.SamplingParams(**sampling))
    return fit_context(request, prompt_tokens, 100)


def test_the_context_is_shared_by_prompt_and_output():
    assert fit(1) == 99
    assert fit(99) == 1
    assert fit(50, max_tokens=50) == 50
    assert fit(50, max_tokens=7) == 7
    with pytest.raises(StatusError, match="prompt: must have at most 99 tokens .* got 100"):
        fit(100)
    with pytest.raises(StatusError, match="sampling.max_tokens: must be at most 50 .* got 51"):
        fit(50, max_tokens=51)
    with pytest.raises(StatusError, match="sampling.min_tokens: must be at most 50 .* got 51"):
        fit(50, min_tokens=51)
    with pytest.raises(StatusError, match="prompt: must not be empty"):
        fit(0)
