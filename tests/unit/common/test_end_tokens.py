"""Tokens that end an answer: the union of what a model's files say, and nothing that is no token."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models

from lying_bases import gguf_bases
from lying_gguf import ARRAY, I32, STRING, U32, Gguf
from scalellm.services.common.end_tokens import end_token_ids
from scalellm.services.common.model_files import ModelFileError

TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "</s>", "<end_of_turn>"]


def write_gguf(path: Path, types: list[int], **ids: Any) -> Path:
    file = Gguf()
    file.add("tokenizer.ggml.tokens", ARRAY, TOKENS, STRING)
    file.add("tokenizer.ggml.token_type", ARRAY, types, I32)
    for role, token_id in ids.items():
        file.add(f"tokenizer.ggml.{role}_token_id", I32 if token_id < 0 else U32, token_id)
    path.write_bytes(file.encoded())
    return path


def write_directory(folder: Path, **documents: Any) -> Path:
    tokenizer = Tokenizer(models.WordLevel({token: number for number, token in enumerate(TOKENS)}, "a"))
    tokenizer.add_special_tokens(TOKENS[:3])
    tokenizer.add_tokens([AddedToken(TOKENS[5], special=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, document in documents.items():
        (folder / f"{name}.json").write_text(json.dumps(document))
    return folder


def test_any_end_of_turn_ends_an_answer_whatever_the_file_calls_eos(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    for eos in (0, 2):
        assert end_token_ids(write_gguf(path, [3, 3, 3, 1, 1, 1], eos=eos)) == (0, 2)
    # Markup only: the texts of `</s>` and `<end_of_turn>` are words here.
    assert end_token_ids(write_gguf(path, [1, 1, 1, 1, 1, 3], eos=3, eot=1, eom=3)) == (1, 3, 5)


def test_an_end_of_messages_ends_no_turn_of_several(tmp_path: Path) -> None:
    for texts, ends in ((["<|end|>", "<|call|>", "<|return|>"], (1, 2)), (["<|end|>", "<|call|>", "a"], (0, 1))):
        tokenizer = Tokenizer(models.WordLevel({text: number for number, text in enumerate(texts)}, "a"))
        tokenizer.add_special_tokens([text for text in texts if text != "a"])
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        assert end_token_ids(tmp_path) == ends
        file = Gguf()
        file.add("tokenizer.ggml.tokens", ARRAY, texts, STRING)
        file.add("tokenizer.ggml.token_type", ARRAY, [1 if text == "a" else 3 for text in texts], I32)
        path = tmp_path.with_suffix(".gguf")
        path.write_bytes(file.encoded())
        assert end_token_ids(path) == ends


def test_the_files_of_a_directory_add_up(tmp_path: Path) -> None:
    assert end_token_ids(write_directory(tmp_path)) == (0, 2)
    assert end_token_ids(write_directory(tmp_path, config={"eos_token_id": 1})) == (0, 1, 2)
    assert end_token_ids(write_directory(tmp_path, generation_config={"eos_token_id": [3, 1]})) == (0, 1, 2, 3)
    for role in ("</s>", {"content": "</s>"}):
        assert end_token_ids(write_directory(tmp_path, tokenizer_config={"eos_token": role})) == (0, 1, 2, 3, 4)


def test_what_is_no_token_is_left_out_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    config = {"eos_token_id": [999, -1, 2**64, "2", True, None, 2.0], "vocab_size": 6}
    assert end_token_ids(write_directory(tmp_path, config=config)) == (0, 2)
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'config.json'}: eos_token_id is {value!r}, which is the id of no token of the model's 6: "
        "it is ignored"
        for value in (999, -1, 2**64, "2", True, 2.0)
    ]
    caplog.clear()
    path = write_gguf(tmp_path / "model.gguf", [3] * 6, eos=4294967295, eot=-1)
    assert end_token_ids(path) == (0, 2, 4, 5)
    assert len(caplog.records) == 2
    assert f"{path}: tokenizer.ggml.eos_token_id is 4294967295" in caplog.text


def test_the_executors_vocabulary_bounds_ids_as_well(tmp_path: Path) -> None:
    assert end_token_ids(write_directory(tmp_path, config={"eos_token_id": 1})) == (0, 1, 2)
    assert end_token_ids(tmp_path, vocab_size=2) == (0, 1)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    write_directory(tmp_path)
    for text in ("{", "[]", "[" * 100_000, '{"a": ' + "9" * 10_000 + "}"):
        (tmp_path / "generation_config.json").write_text(text)
        with pytest.raises(ModelFileError, match=r"generation_config\.json: "):
            end_token_ids(tmp_path)


def test_edge_and_executor_agree(tmp_path: Path) -> None:
    from scalellm.services.executor.weights import read_model_config
    from scalellm.services.tokenizer.text.loading import load_model_tokenizer

    for number, file in enumerate(gguf_bases()):
        path = tmp_path / f"{number}.gguf"
        path.write_bytes(file.encoded())
        assert read_model_config(path).eos_token_ids == load_model_tokenizer(path).eos_token_ids == (2, 3)
