"""The bound never exceeds what the tokenizer makes of a text, and is tight where it has to be."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from on_demand import OnDemand
from scalellm.services.tokenizer.text.model_tokenizer import ModelTokenizer
from scalellm.services.tokenizer.text.token_bound import TokenBound

NAMES = ["smollm2", "gemma3", "byte_level", "byte_fallback", "unigram"]
RUNS = st.builds(
    lambda piece, count: piece * count,
    st.one_of(
        st.text(max_size=4),
        st.sampled_from(
            [" ", "\n", "\t", "▁", "a", "=", "-", "0", "é", "e\u0301", "数", "😀", "<|im_end|>", "<s>", "\xa0"]
        ),
    ),
    st.integers(1, 60),
)
TEXTS = st.lists(RUNS, max_size=6).map("".join)


@pytest.fixture(scope="module")
def bounds(tokenizers: dict[str, Tokenizer]) -> dict[str, TokenBound]:
    return OnDemand(lambda name: TokenBound(tokenizers[name]))


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=150)
@given(text=TEXTS)
def test_no_text_has_fewer_tokens(name: str, text: str, tokenizers, bounds) -> None:
    assert bounds[name].at_least(text) <= len(tokenizers[name].encode(text, add_special_tokens=False).ids)


@pytest.fixture(scope="module")
def composing(smollm2: ModelTokenizer) -> Tokenizer:
    """A tokenizer like Qwen's: composes characters, and has a token that takes white space along."""
    tokenizer = Tokenizer.from_str(smollm2.tokenizer.to_str())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    return tokenizer


@pytest.fixture(scope="module")
def composing_bound(composing: Tokenizer) -> TokenBound:
    return TokenBound(composing)


@settings(max_examples=300)
@given(text=st.lists(st.one_of(RUNS, st.sampled_from(["<mask>", "\u0338", "  ", ">", "e\u0301"]))).map("".join))
def test_composed_characters(text: str, composing: Tokenizer, composing_bound: TokenBound) -> None:
    assert composing_bound.at_least(text) <= len(composing.encode(text).ids)


def test_a_text_that_is_not_composed_is_no_way_out(composing_bound: TokenBound) -> None:
    digits = "0123456789" * 5000
    assert composing_bound.at_least(digits + "e\u0301") > 49_000


def test_digits_count_one_by_one(tokenizers, bounds) -> None:
    digits = "0123456789" * 1000
    for name in ("smollm2", "gemma3"):
        assert len(tokenizers[name].encode(digits, add_special_tokens=False).ids) == 10_000
    assert bounds["smollm2"].at_least(digits) > 10_000 / 16
    assert bounds["gemma3"].at_least("数" * 10_000) > 0


@pytest.mark.parametrize("mark", ["▁", "_"])
def test_marks_for_spaces(mark: str) -> None:
    vocabulary = [(mark * count, -1.0) for count in (1, 2, 4)] + [("x", -1.0)]
    if mark != "▁":
        vocabulary.append(("▁", -1.0))
    tokenizer = Tokenizer(models.Unigram([("<unk>", -9.0), *vocabulary], unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=mark, split=False)
    text = " " * 4000
    assert TokenBound(tokenizer).at_least(text) <= len(tokenizer.encode(text).ids)


def test_added_tokens_with_spaces(byte_fallback: Tokenizer) -> None:
    tokenizer = Tokenizer.from_str(byte_fallback.to_str())
    tokenizer.add_tokens([AddedToken("a b", normalized=True, special=False)])
    text = "a▁b" * 1000
    assert TokenBound(tokenizer).at_least(text) <= len(tokenizer.encode(text, add_special_tokens=False).ids)


def test_nothing_is_said_of_tokenizers_that_drop_text(smollm2) -> None:
    dropping = Tokenizer.from_str(smollm2.tokenizer.to_str())
    dropping.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    assert TokenBound(dropping).at_least("a b " * 1000) == 0
