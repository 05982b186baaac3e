"""The language model of a Gemma 3 that reads images as well: the same logits for text as transformers computes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig, SiglipVisionConfig

from scalellm.services.executor.model_config.errors import UnsupportedModelError
from scalellm.services.executor.model_config.hf_config import config_from_hf
from scalellm.services.executor.models import ModelRuntime
from scalellm.services.executor.weights import load_model, read_model_config

TEXT = {
    "vocab_size": 211,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "sliding_window": 20,
}


@pytest.fixture
def oracle(tmp_path: Path) -> Any:
    torch.manual_seed(0)
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = Gemma3Config(text_config=Gemma3TextConfig(**TEXT), vision_config=vision, mm_tokens_per_image=4)
    config._attn_implementation = "eager"
    model = Gemma3ForConditionalGeneration(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.15)
    model.save_pretrained(tmp_path)
    return model


def rename(name: str, layout: str) -> str:
    """The name of a tensor in files of the Hub, or in those that transformers 5 may write."""
    inner = name.removeprefix("model.").replace("language_model.model.", "language_model.")
    if layout == "5":
        return f"model.{inner}"
    return inner.replace("language_model.", "language_model.model.", 1)


@pytest.mark.parametrize("layout", ["Hub", "5"])
def test_logits(layout: str, oracle: Any, paged: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tensors = {rename(name, layout): tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    model, config = load_model(tmp_path, ModelRuntime())
    assert config.architecture == "Gemma3ForCausalLM"
    prompt = [(7 * i + 3) % 200 for i in range(40)]
    with torch.inference_mode():
        expected = oracle(torch.tensor([prompt])).logits[0]
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(paged(model, config).step({0: prompt})[0], expected, atol=1e-4, rtol=0)


def test_a_configuration_of_the_hub(tmp_path: Path) -> None:
    """Gemma 3 4B's says of its text only what differs from the defaults of the class."""
    raw = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "boi_token_index": 255999,
        "eoi_token_index": 256000,
        "eos_token_id": [1, 106],
        "image_token_index": 262144,
        "initializer_range": 0.02,
        "mm_tokens_per_image": 256,
        "model_type": "gemma3",
        "text_config": {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "model_type": "gemma3_text",
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "torch_dtype": "bfloat16",
        "transformers_version": "4.50.0.dev0",
        "vision_config": {"hidden_size": 1152},
    }
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config, oracle = read_model_config(tmp_path), Gemma3TextConfig(**raw["text_config"])  # type: ignore[arg-type]
    for ours, theirs in (
        ("vocab_size", "vocab_size"),
        ("num_heads", "num_attention_heads"),
        ("num_kv_heads", "num_key_value_heads"),
        ("head_dim", "head_dim"),
        ("max_position_embeddings", "max_position_embeddings"),
        ("sliding_window", "sliding_window"),
    ):
        assert getattr(config, ours) == getattr(oracle, theirs)
    assert config.tie_word_embeddings
    assert config.eos_token_ids == (1, 106)
    with pytest.raises(UnsupportedModelError, match="config.json: clip_image is 1; this key is not known here"):
        config_from_hf({**raw, "clip_image": 1})
    with pytest.raises(
        UnsupportedModelError, match="config.json: text_config: logit_scale is 2; this key is not known"
    ):
        config_from_hf({**raw, "text_config": {**TEXT, "logit_scale": 2}})
