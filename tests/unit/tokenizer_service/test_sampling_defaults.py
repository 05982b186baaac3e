"""The model's own sampling settings, from its generation_config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scalellm.services.common.lifecycle import StartError
from scalellm.services.tokenizer.sampling_defaults import read_sampling_defaults, with_defaults
from scalellm.v1.common_pb2 import SamplingParams


def read(folder: Path, config: Any) -> SamplingParams:
    (folder / "generation_config.json").write_text(json.dumps(config))
    return read_sampling_defaults(folder)


def test_what_a_published_model_says(tmp_path: Path) -> None:
    """Qwen3's file; transformers' other settings are none of ours."""
    config = {
        "bos_token_id": 151643,
        "do_sample": True,
        "eos_token_id": [151645, 151643],
        "pad_token_id": 151643,
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "max_new_tokens": 64,
        "transformers_version": "4.51.0",
    }
    assert read(tmp_path, config) == SamplingParams(temperature=0.6, top_k=20, top_p=0.95)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, SamplingParams()),
        ({"temperature": None, "top_k": -1, "min_p": 0}, SamplingParams(top_k=0, min_p=0)),
        ({"temperature": 0, "repetition_penalty": 1.1}, SamplingParams(temperature=0, repetition_penalty=1.1)),
    ],
)
def test_other_files(tmp_path: Path, config: dict[str, Any], expected: SamplingParams) -> None:
    assert read(tmp_path, config) == expected


def test_models_without_the_file(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    for model in (tmp_path, tmp_path / "model.gguf"):
        assert read_sampling_defaults(model) == SamplingParams()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"temperature": "hot"}, "temperature is 'hot'; it must be a number"),
        ({"temperature": True}, "temperature is True; it must be a number"),
        ({"temperature": 1e300}, r"temperature is 1e\+300; it must be a number"),
        ({"temperature": float("nan")}, "temperature is nan; it must be a number"),
        ({"top_k": 2.5}, "top_k is 2.5; it must be a number"),
        ({"top_p": 1.5}, r"top_p: must be in \(0, 1\], got 1.5"),
        ({"repetition_penalty": 0}, r"repetition_penalty: must be in \(0, 2\], got 0"),
        ([], "a JSON object is expected"),
    ],
)
def test_a_value_that_no_request_could_have_is_refused_by_name(tmp_path: Path, config: Any, said: str) -> None:
    with pytest.raises(StartError, match=f"generation_config.json: {said}; correct it, or .*--generation-config none"):
        read(tmp_path, config)


def test_what_a_request_says_wins() -> None:
    defaults = SamplingParams(temperature=0.6, top_k=20, top_p=0.95)
    assert with_defaults(SamplingParams(max_tokens=5), defaults) == SamplingParams(
        max_tokens=5, temperature=0.6, top_k=20, top_p=0.95
    )
    greedy = SamplingParams(temperature=0, top_k=0, top_p=1, stop_token_ids=[1])
    assert with_defaults(greedy, defaults) == greedy
    assert defaults == SamplingParams(temperature=0.6, top_k=20, top_p=0.95)
