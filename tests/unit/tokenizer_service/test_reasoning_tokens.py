"""Tokens of reasoning are counted exactly: those between the marks, however they were batched on their way."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer

from scalellm.services.tokenizer.generation.answer import make_samples
from scalellm.services.tokenizer.generation.answer_shape import tell_apart
from scalellm.services.tokenizer.sample_stream import OutputOptions
from scalellm.services.tokenizer.token_receiver import TokenBatch
from scalellm.services.tokenizer.writing import Writing
from scalellm.v1 import common_pb2, generation_pb2, link_pb2
from tool_templates import HARMONY, HERMES

ALL_TEXT = OutputOptions(keep_answer=True)
NO_TEXT = OutputOptions(text=False)
VOCAB = 49152
EOS = 2
HARMONY_MARKS = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>")
THINK_MARKS = ("<think>", "</think>")
ANSWERS = {
    "think": ["\n<think>", None, "</think>\n\n", "It is."],
    "open": [None, "</think>", "It is."],
    "cut off": ["<think>", None],
    "none": ["It is <think> all the same </think>"],
    "harmony": [
        *("<|channel|>analysis<|message|>", None, "<|end|><|start|>assistant<|channel|>commentary<|message|>I look."),
        *("<|end|><|start|>assistant<|channel|>analysis<|message|>", None, "<|end|><|start|>assistant"),
        "<|channel|>final<|message|>It is.",
    ],
}
"""Texts of answers; random reasoning is put in for each None."""


@pytest.fixture(scope="module")
def writings(smollm):
    """Dialects of two models with their tokenizers: one puts marks around reasoning, the other uses a channel."""
    made = {}
    for template, marks, is_special in ((HERMES, THINK_MARKS, False), (HARMONY, HARMONY_MARKS, True)):
        tokenizer = Tokenizer.from_str(smollm.tokenizer.to_str())
        tokens = [AddedToken(text, special=is_special, normalized=False) for text in marks]
        (tokenizer.add_special_tokens if is_special else tokenizer.add_tokens)(tokens)
        writing = Writing(replace(smollm, tokenizer=tokenizer, chat_templates={"default": template}))
        made[template] = writing, tokenizer
    return made


def sample_of(writing, model, opening, *, stop=(), options=ALL_TEXT):
    """The one sample of a request, behind a prompt."""
    request = generation_pb2.GenerateRequest(stop=stop, reasoning=generation_pb2.ReasoningOptions())
    prompt = {"open": "<think>", "harmony": "<|start|>assistant"}.get(opening, "Is it?")
    submit = link_pb2.Submit(request_id="r", sampling=common_pb2.SamplingParams(n=1))
    submit.token_ids.extend(model.encode(prompt, add_special_tokens=False).ids)
    (sample,) = make_samples(request, options, submit, writing)
    return sample


def together(parts):
    """Parts, those put together that are more of the same."""
    return [
        (kind, "".join(part.text for part in run)) for kind, run in itertools.groupby(parts, lambda part: part.kind)
    ]


def encoded(model, text):
    return model.encode(text, add_special_tokens=False).ids


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(ANSWERS)),
    thoughts=st.lists(st.lists(st.integers(17, VOCAB - 1), max_size=8), min_size=2, max_size=2),
    stop=st.sampled_from([(), ("</think>\n\nNo such text",), ("assistantfinalNo such text",)]),
    options=st.sampled_from([ALL_TEXT, NO_TEXT]),
    data=st.data(),
)
def test_however_tokens_come_those_of_reasoning_are_counted(writings, name, thoughts, stop, options, data):
    writing, model = writings[HARMONY if name == "harmony" else HERMES]
    left = list(thoughts)
    expected, token_ids = 0, []
    for piece in ANSWERS[name]:
        part = left.pop() if piece is None else encoded(model, piece)
        expected += len(part) if piece is None else 0
        token_ids += part
    sample = sample_of(writing, model, name, stop=stop, options=options)
    whole = list(token_ids)
    while token_ids:
        count = data.draw(st.integers(1, len(token_ids)))
        sample.push(TokenBatch(0, token_ids[:count], None, None))
        token_ids = token_ids[count:]
    finish = link_pb2.LinkSampleFinish(index=0, reason=common_pb2.FINISH_REASON_STOP, stop_token_id=EOS)
    sample.push(TokenBatch(0, [EOS], None, finish))
    assert sample.num_reasoning_tokens == expected
    at_once = sample_of(writing, model, name, stop=stop, options=options)
    at_once.push(TokenBatch(0, [*whole, EOS], None, finish))
    assert at_once.num_reasoning_tokens == expected
    assert together(at_once.answer_parts) == together(sample.answer_parts)


@pytest.mark.parametrize("cuts", [1, 3, 100])
def test_what_comes_behind_a_stop_text_is_not_counted(writings, cuts):
    writing, model = writings[HERMES]
    token_ids = encoded(model, "<think>one two three four")
    shown = len(encoded(model, "<think>one two three"))
    sample = sample_of(writing, model, "think", stop=(" three",))
    for place in range(0, len(token_ids), cuts):
        sample.push(TokenBatch(0, token_ids[place : place + cuts], None, None))
    assert sample.num_tokens == shown
    assert sample.num_reasoning_tokens == shown - 1


def test_without_a_mark_of_one_token_nothing_is_counted(smollm):
    writing = Writing(replace(smollm, chat_templates={"default": HERMES}))
    assert not writing.can_count_reasoning
    assert sample_of(writing, smollm.tokenizer, "think").num_reasoning_tokens is None


def test_chats_of_a_model_with_channels_are_always_told_apart(writings):
    for template, is_told in ((HARMONY, True), (HERMES, False)):
        chat = generation_pb2.GenerateRequest(chat=generation_pb2.Chat())
        tell_apart(chat, writings[template][0])
        assert chat.HasField("reasoning") == is_told
    text = generation_pb2.GenerateRequest(prompt="Is it?")
    tell_apart(text, writings[HARMONY][0])
    assert not text.HasField("reasoning")
