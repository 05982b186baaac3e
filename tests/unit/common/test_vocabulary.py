"""The bytes of tokens, against the detokenizer, which is proven against the tokenizers library."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models

from scalellm.services.common.vocabulary import VocabularyError, read_vocabulary
from scalellm.services.tokenizer.text.detokenizer import TokenTexts
from scalellm.services.tokenizer.text.loading import load_model_tokenizer


@pytest.mark.parametrize("name", ["smollm2-135m-instruct", pytest.param("gemma3-270m", marks=pytest.mark.slow)])
def test_tokens_of_a_gguf_file_are_those_of_the_detokenizer(model_dir, name: str) -> None:
    tokenizer = load_model_tokenizer(model_dir(name)).tokenizer
    texts = TokenTexts(tokenizer)
    size = len(texts.tokens)
    vocabulary = read_vocabulary(model_dir(name), size)
    assert vocabulary.tokens == [texts.bytes_of(token_id) for token_id in range(size)]
    assert vocabulary.special_ids == set(texts.special_ids.values())


def save(folder: Path, tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_tokens([AddedToken("<|end|>", special=True), AddedToken("<tool>", special=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "Ġa": 1, "Ã": 2, "©": 3}, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def pieces() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁a", -1.0), ("<0xC3>", -2.0), ("é", -3.0)], 0, True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


@pytest.mark.parametrize("make", [byte_level, pieces])
def test_tokens_of_a_tokenizer_json(tmp_path: Path, make) -> None:
    texts = TokenTexts(save(tmp_path, make()))
    # The model has more tokens than its tokenizer, and then fewer.
    vocabulary = read_vocabulary(tmp_path, 8)
    assert vocabulary.tokens == [*(texts.bytes_of(token_id) for token_id in range(6)), b"", b""]
    assert vocabulary.special_ids == {4}
    few = read_vocabulary(tmp_path, 3)
    assert (few.tokens, few.special_ids) == (vocabulary.tokens[:3], frozenset())


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({}, "not a tokenizer"),
        ({"model": {"vocab": 3}}, "not a tokenizer"),
        ({"model": {"vocab": {"a": 0}}, "added_tokens": [{}]}, "not a tokenizer"),
        (
            {"model": {"vocab": {"\ud800": 0}}, "decoder": {"type": "ByteLevel"}},
            "tokenizer.json: the token .* no Unicode",
        ),
        (
            {"model": {"vocab": {"\ud800": 0}}, "decoder": {"type": "ByteFallback"}},
            "tokenizer.json: the token .* no Unicode",
        ),
        ({"model": {"vocab": {"a": 0}}, "decoder": {"type": "WordPiece"}}, "'WordPiece' is not supported"),
    ],
)
def test_what_is_no_vocabulary_is_refused_in_a_sentence(tmp_path: Path, content: dict, says: str) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(VocabularyError, match=says):
        read_vocabulary(tmp_path, 4)
    with pytest.raises(VocabularyError, match="holds neither"):
        read_vocabulary(tmp_path / "none", 4)
