"""Safetensors directories: shards, ties, dtypes, byte counts, progress."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from scalellm.services.executor.models import CausalLM, ModelRuntime
from scalellm.services.executor.weights import UnsupportedModelError, load_model, read_model_config, weight_bytes

CPU = torch.device("cpu")


def load(path: Path, dtype: torch.dtype = torch.float32) -> CausalLM:
    return load_model(path, ModelRuntime(dtype=dtype))[0]


def weights(model: CausalLM) -> dict[str, torch.Tensor]:
    return {slot.name: slot.dest for slot in model.weight_slots()}


def test_every_tensor_arrives(family: str, hf_model: Callable[..., Any], tmp_path: Path) -> None:
    hf_model(family).save_pretrained(tmp_path)
    loaded = weights(load(tmp_path))
    expected = load_file(tmp_path / "model.safetensors")
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(loaded[name], tensor, atol=0, rtol=0)


def test_sharded(hf_model: Callable[..., Any], tmp_path: Path) -> None:
    oracle = hf_model("llama")
    oracle.save_pretrained(tmp_path / "one")
    oracle.save_pretrained(tmp_path / "many", max_shard_size="60KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    whole, sharded = weights(load(tmp_path / "one")), weights(load(tmp_path / "many"))
    for name, tensor in whole.items():
        assert torch.equal(sharded[name], tensor)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_dtype_conversion(
    stored: torch.dtype, wanted: torch.dtype, hf_model: Callable[..., Any], tmp_path: Path
) -> None:
    oracle = hf_model("gemma3").to(stored)
    oracle.save_pretrained(tmp_path)
    expected = oracle.state_dict()
    for name, tensor in weights(load(tmp_path, wanted)).items():
        assert tensor.dtype == wanted
        assert torch.equal(tensor, expected[name].to(wanted))


def test_untied_head_differs_from_the_embedding(hf_model: Callable[..., Any], tmp_path: Path) -> None:
    hf_model("llama", tie_word_embeddings=False).save_pretrained(tmp_path)
    loaded = weights(load(tmp_path))
    assert not torch.equal(loaded["lm_head.weight"], loaded["model.embed_tokens.weight"])


def test_weight_bytes_is_what_the_model_holds(family: str, hf_model: Callable[..., Any], tmp_path: Path) -> None:
    hf_model(family).save_pretrained(tmp_path)
    config = read_model_config(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        model, _ = load_model(tmp_path, ModelRuntime(dtype=dtype), max_model_len=100)
        assert weight_bytes(config, ModelRuntime(dtype=dtype), max_model_len=100) == model.num_bytes()
    tables = len({config.layer_rope(layer) for layer in range(config.num_layers)})
    difference = weight_bytes(config, ModelRuntime()) - weight_bytes(config, ModelRuntime(), max_model_len=100)
    assert difference == tables * (config.max_position_embeddings - 100) * config.head_dim * 4


def test_progress_counts_the_weights_up_to_the_total(hf_model: Callable[..., Any], tmp_path: Path) -> None:
    hf_model("qwen3").save_pretrained(tmp_path)
    reports: list[tuple[int, int]] = []
    model, _ = load_model(tmp_path, ModelRuntime(), on_progress=lambda done, total: reports.append((done, total)))
    total = sum(slot.dest.nbytes for slot in model.weight_slots())
    assert [done for done, _ in reports] == sorted({done for done, _ in reports})
    assert {whole for _, whole in reports} == {total}
    assert reports[-1][0] == total


def test_max_model_len_beyond_the_model_is_refused(hf_model: Callable[..., Any], tmp_path: Path) -> None:
    hf_model("llama").save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"max_model_len 513 exceeds .* max_position_embeddings 512"):
        load_model(tmp_path, ModelRuntime(), max_model_len=513)
