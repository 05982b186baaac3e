"""Patterns of a tokenizer.json that take far too long on some texts are refused; those of real models are not."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain, repeat

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from scalellm.services.tokenizer.text.model_tokenizer import UnsupportedTokenizerError
from scalellm.services.tokenizer.text.pattern_probe import check_patterns
from scalellm.services.tokenizer.text.pre_tokenizers import PRE_TOKENIZERS

GPT_4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def tokenizer_with(pattern: str, *, normalizes: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    if normalizes:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(Regex(pattern), " ")])
    else:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(use_regex=False)])
    return tokenizer


@pytest.mark.parametrize("pattern", [r"(a+)+b", r"(?:x|x)+y", r"(\s*\w*)*x", r"a+@"])
def test_a_pattern_that_takes_too_long_is_refused(pattern: str) -> None:
    with pytest.raises(UnsupportedTokenizerError, match="takes too long on repeated characters") as refused:
        check_patterns(tokenizer_with(pattern), "model/tokenizer.json")
    assert str(refused.value).startswith(f"model/tokenizer.json: the pattern {pattern!r}")


def test_patterns_of_normalizers_are_tried() -> None:
    with pytest.raises(UnsupportedTokenizerError, match="takes too long"):
        check_patterns(tokenizer_with(r"(a+)+b", normalizes=True), "model/tokenizer.json")


@pytest.mark.parametrize("pattern", [GPT_4O, " {2,}", r"\p{N}{1,3}", r"[一-龥]+|[぀-ヿ]+"])
def test_patterns_of_other_models_are_taken(pattern: str) -> None:
    check_patterns(tokenizer_with(pattern), "model/tokenizer.json")


def test_a_single_long_measurement_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread may have collected garbage, or stood for a neighbour."""
    seconds = chain([9.0, 9.0], repeat(0.0))

    def measured(call: Callable[[], object]) -> float:
        call()
        return next(seconds)

    monkeypatch.setattr("scalellm.services.tokenizer.text.pattern_probe._cpu_seconds", measured)
    check_patterns(tokenizer_with(r"\p{N}{1,3}"), "model/tokenizer.json")


def test_patterns_that_are_known_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scalellm.services.tokenizer.text.pattern_probe._MOST_SECONDS", -1.0)
    for rule in PRE_TOKENIZERS.values():
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = rule.build()
        check_patterns(tokenizer, "model/tokenizer.json")
