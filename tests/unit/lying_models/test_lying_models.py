"""Model files that lie are loaded or refused in a line: nothing else is raised, hangs or takes memory."""

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lying_bases import gguf_bases, hugging_face_bases
from lying_gguf import U32, Value
from lying_models import FORMATS, Mutant, is_fine, mutants, outcome, outcomes
from scalellm.services.executor.engine.config import EngineConfig, EngineConfigError


def test_models_that_are_made_to_lie_load(tmp_path: Path) -> None:
    files = [*hugging_face_bases(), *({"model.gguf": file.encoded()} for file in gguf_bases())]
    for number, base in enumerate(files):
        assert outcome(Mutant("base", number, "", base).write(tmp_path)) == "loaded"


@pytest.mark.parametrize("name", FORMATS)
def test_mutants_are_loaded_or_refused_in_a_line(name: str, tmp_path: Path) -> None:
    """More of them are tried by `make test-hostile`."""
    ends = [(str(mutant), end) for mutant, end in outcomes(mutants(name, seed=1, count=50), tmp_path)]
    assert len(ends) == 50
    assert [end for end in ends if not is_fine(end[1])] == []
    assert sum(end == "loaded" for _, end in ends) > 2
    assert sum(end != "loaded" for _, end in ends) > 20


def test_equal_seeds_give_equal_mutants() -> None:
    for name in FORMATS:
        first = list(mutants(name, seed=1, count=20))
        assert first == list(mutants(name, seed=1, count=20))
        assert len({tuple(mutant.files.values()) for mutant in first}) > 15


@pytest.mark.parametrize("value", [999, -1, 4294967295, [2, 2**40], "2", True])
def test_an_end_token_that_is_none_costs_no_request_and_no_neighbour(value: Any, tmp_path: Path) -> None:
    files = hugging_face_bases()[0]
    config = json.loads(files["config.json"]) | {"eos_token_id": value}
    lying = {**files, "config.json": json.dumps(config).encode()}
    # One of the two requests asks for min_tokens, which keeps the ids of the file from being drawn.
    assert outcome(Mutant("config", 0, "", lying).write(tmp_path)) == "loaded"


@pytest.mark.parametrize("role", ["bos", "eos", "eot", "padding", "unknown"])
@pytest.mark.parametrize("value", [999, 4294967295])
def test_a_role_of_no_token_is_ignored(role: str, value: int, tmp_path: Path) -> None:
    for file in gguf_bases():
        values = dict(file.values) | {f"tokenizer.ggml.{role}_token_id": Value(U32, value)}
        lying = replace(file, values=list(values.items()))
        assert outcome(Mutant("gguf", 0, "", {"model.gguf": lying.encoded()}).write(tmp_path)) == "loaded"


def test_an_id_of_a_tokenizer_takes_no_memory(tmp_path: Path) -> None:
    """A table of texts with a place for each id up to four billion took 32 GB."""
    files = hugging_face_bases()[0]
    tokenizer = json.loads(files["tokenizer.json"])
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][-1] | {"content": "<far>", "id": 4_000_000_000})
    tokenizer["model"]["vocab"]["<far>"] = 4_000_000_000
    lying = Mutant("tokenizer", 0, "", {**files, "tokenizer.json": json.dumps(tokenizer).encode()})
    ((_, end),) = outcomes([lying], tmp_path)
    assert end == (
        f"refused: {tmp_path / 'tokenizer.json'}: the token '<far>' has id 4000000000; at most 4194303 is supported"
    )


def test_a_tokenizer_under_which_texts_grow_is_refused(tmp_path: Path) -> None:
    files = hugging_face_bases()[0]
    tokenizer = json.loads(files["tokenizer.json"])
    tokenizer["pre_tokenizer"]["pretokenizers"] *= 100
    lying = Mutant("tokenizer", 0, "", {**files, "tokenizer.json": json.dumps(tokenizer).encode()})
    ((_, end),) = outcomes([lying], tmp_path)
    assert end.startswith(f"refused: {tmp_path / 'tokenizer.json'}: normalizer and pre_tokenizer make a text up to ")


def test_gguf_keys_and_tensors_are_there_once(tmp_path: Path) -> None:
    file = gguf_bases()[0]
    twice = (
        replace(file, values=[*file.values, file.values[0]]),
        replace(file, tensors=[*file.tensors, file.tensors[0]]),
    )
    ends = [outcome(Mutant("gguf", 0, "", {"model.gguf": part.encoded()}).write(tmp_path)) for part in twice]
    assert "the key 'general.architecture' is there twice" in ends[0]
    assert "the tensor token_embd.weight is there twice" in ends[1]


def test_a_text_of_a_gguf_file_is_no_longer_than_files_are(tmp_path: Path) -> None:
    file = gguf_bases()[0]
    data = file.encoded().replace(struct.pack("<Q", 5) + b"<pad>", struct.pack("<Q", 2**63) + b"<pad>")
    end = outcome(Mutant("gguf", 0, "", {"model.gguf": data}).write(tmp_path))
    assert end.endswith("not a readable GGUF file: 'tokenizer.ggml.tokens': a length that no file has")


def test_an_engine_draws_only_what_there_is() -> None:
    with pytest.raises(EngineConfigError, match="eos_token_ids has 261; token ids are between 0 and 260"):
        EngineConfig(num_blocks=16, max_model_len=64, vocab_size=261, eos_token_ids=frozenset({2, 261}))
