"""Hosts with the same files of a model agree; other weights, or a part of them, are told."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from scalellm.services.common.lifecycle import StartError
from scalellm.services.executor.nodes.model_digest import model_digest


def write(folder: Path, weights: dict[str, bytes], config: str = "{}") -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(config)
    for name, data in weights.items():
        (folder / name).write_bytes(data)
    return folder


def test_what_the_weights_say_counts_and_where_they_lie_does_not(tmp_path: Path) -> None:
    first, second, other = (random.Random(seed).randbytes(600_000) for seed in range(3))
    weights = {"model-1.safetensors": first, "model-2.safetensors": second}
    digest = model_digest(write(tmp_path / "here", weights))
    assert digest == model_digest(write(tmp_path / "there", weights | {"README.md": b"another"}))
    others = [
        (weights | {"model-2.safetensors": other}, "{}"),
        (weights | {"model-2.safetensors": second[:-1]}, "{}"),
        ({"model-1.safetensors": first}, "{}"),
        (weights | {"model-2.safetensors": first, "model-1.safetensors": second}, "{}"),
        (weights, '{"rope_theta": 1}'),
    ]
    found = {model_digest(write(tmp_path / str(n), files, config)) for n, (files, config) in enumerate(others)}
    assert len(found | {digest}) == len(others) + 1


def test_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="holds neither a .gguf file nor a config.json"):
        model_digest(tmp_path)
