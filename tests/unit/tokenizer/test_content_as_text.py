"""Contents whose special tokens are text: the template's are special, the contents' are not, nothing else changes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from on_demand import OnDemand
from scalellm.services.tokenizer.text.content_as_text import MarkedText, SpecialTexts
from scalellm.services.tokenizer.text.encoder import EncodeBatcher
from scalellm.services.tokenizer.text.model_tokenizer import ModelTokenizer

BEGIN, END = "<|im_start|>", "<|im_end|>"
CONTENTS = st.lists(
    st.sampled_from([BEGIN, END, "<|im_", "end|>", "<|endoftext|>", "a", " b", "\n", "é", "\ue000"]), max_size=6
).map("".join)


def rendered(special: SpecialTexts, contents: list[str]) -> MarkedText:
    mark = special.choose_mark(contents)
    assert not any(mark in content for content in contents)
    turns = (f"{BEGIN}user\n{special.mark(content, mark)}{END}\n" for content in contents)
    return MarkedText("".join(turns), mark)


@pytest.fixture(scope="module")
def encoders(tokenizers: dict[str, Tokenizer]) -> dict[str, EncodeBatcher]:
    """Encoders by tokenizer; the tests call the part of an encoder that runs in a thread."""
    return OnDemand(lambda name: EncodeBatcher(tokenizers[name]))


@pytest.fixture(scope="module")
def special_tokens(tokenizers: dict[str, Tokenizer]) -> dict[str, list[str]]:
    """The texts of each tokenizer's special tokens: Gemma has thousands of added tokens to look through."""

    def special(name: str) -> list[str]:
        return [token.content for token in tokenizers[name].get_added_tokens_decoder().values() if token.special]

    return OnDemand(special)


@pytest.fixture(scope="module")
def oracle(smollm2: ModelTokenizer) -> PreTrainedTokenizerFast:
    oracle = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(smollm2.tokenizer.to_str()))
    oracle.add_special_tokens({"additional_special_tokens": [BEGIN, END, "<|endoftext|>"]})
    return oracle


@settings(max_examples=150)
@given(contents=st.lists(CONTENTS, min_size=1, max_size=3))
def test_contents_are_text(contents: list[str], oracle: PreTrainedTokenizerFast, encoders, smollm2) -> None:
    begin, end = smollm2.tokenizer.token_to_id(BEGIN), smollm2.tokenizer.token_to_id(END)
    expected: list[int] = []
    for content in contents:
        expected += [begin, *oracle.encode(f"user\n{content}", split_special_tokens=True), end]
        expected += oracle.encode("\n", split_special_tokens=True)
    text = rendered(encoders["smollm2"].special_texts, contents)
    assert text.plain == "".join(f"{BEGIN}user\n{content}{END}\n" for content in contents)
    assert encoders["smollm2"]._encode_marked(text, 10**6) == expected


@pytest.mark.parametrize("name", ["smollm2", "gemma3", "byte_level"])
@settings(max_examples=60)
@given(pieces=st.lists(st.one_of(st.text(max_size=5), st.integers(0, 10)), max_size=6))
def test_without_marks_it_is_the_same(name: str, pieces: list[str | int], tokenizers, encoders, special_tokens) -> None:
    special = special_tokens[name]
    text = "".join(piece if isinstance(piece, str) else special[piece % len(special)] for piece in pieces)
    assert encoders[name].special_texts.are_alone
    ids = encoders[name]._encode_marked(MarkedText(text), 10**6)
    assert ids == tokenizers[name].encode(text, add_special_tokens=False).ids


@given(content=CONTENTS, start=st.integers(0, 80))
def test_the_rest_of_a_marked_text(content: str, start: int, smollm2: ModelTokenizer) -> None:
    text = rendered(SpecialTexts(smollm2.tokenizer), [content])
    start = min(start, len(text.plain))
    assert text.rest(start).plain == text.plain[start:]
    # Of a mark at the border nothing is lost that would make a special token again.
    assert text.text.endswith(text.rest(start).text)


def test_one_special_token_may_begin_where_another_ends(byte_level: Tokenizer) -> None:
    tokenizer = Tokenizer.from_str(byte_level.to_str())
    tokenizer.add_special_tokens(["<a>", ">b>", "<a><c>"])
    special = SpecialTexts(tokenizer)
    for text in ("<a>b>", "<a><c>", "<<a>a>b>"):
        marked = MarkedText(special.mark(text, "\ue000"), "\ue000")
        assert special.split(marked) == [text]
    assert special.split(MarkedText("x<a><c>y<a>")) == [
        "x",
        tokenizer.token_to_id("<a><c>"),
        "y",
        tokenizer.token_to_id("<a>"),
    ]
