"""Model files that lie are loaded or refused in a line: nothing else is raised, hangs or takes memory."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lying_bases import gguf_bases, hugging_face_bases
from lying_gguf import U32, Value
from lying_models import FORMATS, Mutant, mutants, outcome
from services.executor.engine.config import EngineConfig, EngineConfigError


def test_models_that_are_made_to_lie_load(tmp_path: Path) -> None:
    files = [*hugging_face_bases(), *({"model.gguf": file.encoded()} for file in gguf_bases())]
    for number, base in enumerate(files):
        assert outcome(Mutant("base", number, "", base).write(tmp_path)) == "loaded"


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


def test_an_engine_draws_only_what_there_is() -> None:
    with pytest.raises(EngineConfigError, match="eos_token_ids has 261; token ids are between 0 and 260"):
        EngineConfig(num_blocks=16, max_model_len=64, vocab_size=261, eos_token_ids=frozenset({2, 261}))
