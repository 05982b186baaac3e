"""Every key of a config.json is read, known not to matter, or refused by name; none is ignored."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from lying_bases import gguf_bases
from lying_gguf import F32, U32, Value
from scalellm.services.executor.model_config.hf_config import config_from_hf
from scalellm.services.executor.models import ModelRuntime
from scalellm.services.executor.weights import UnsupportedModelError, load_model, read_model_config

CONFIGS = (
    (LlamaConfig, "LlamaForCausalLM"),
    (MistralConfig, "MistralForCausalLM"),
    (MixtralConfig, "MixtralForCausalLM"),
    (Qwen2Config, "Qwen2ForCausalLM"),
    (Qwen3Config, "Qwen3ForCausalLM"),
    (Qwen3MoeConfig, "Qwen3MoeForCausalLM"),
    (Gemma3TextConfig, "Gemma3ForCausalLM"),
)
TOKENS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 97, 93, 23, 84] * 8


def changed(checkpoint: Path, **change: Any) -> Path:
    file = checkpoint / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    return checkpoint


def refusal(path: Path) -> str:
    with pytest.raises(UnsupportedModelError) as refused:
        load_model(path, ModelRuntime())
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(("config_class", "architecture"), CONFIGS)
def test_all_keys_that_transformers_writes_are_known(config_class: type[Any], architecture: str) -> None:
    # Whole, defaults included, and as it is saved.
    raw = json.loads(json.dumps(config_class(architectures=[architecture]).to_dict()))
    assert config_from_hf(raw).architecture == architecture
    saved = json.loads(config_class(architectures=[architecture]).to_json_string())
    assert config_from_hf(saved).architecture == architecture


@pytest.mark.parametrize(("config_class", "architecture"), CONFIGS)
@pytest.mark.parametrize("key", ["logit_scale", "residual_multiplier", "no_rope_layers", "clip_qkv"])
def test_an_unknown_key_is_refused_by_name(config_class: type[Any], architecture: str, key: str) -> None:
    raw = json.loads(config_class(architectures=[architecture]).to_json_string())
    config_from_hf(raw | {key: None})
    with pytest.raises(UnsupportedModelError, match=f"config.json: {key} is 2; this key is not known here"):
        config_from_hf(raw | {key: 2})


@pytest.mark.parametrize(
    "own",
    [
        {
            "_name_or_path": "a/b",
            "transformers_version": "4.52.0",
            "torch_dtype": "bfloat16",
            "unsloth_version": "2025",
        },
        {"auto_map": {"AutoConfig": "x.Y"}, "use_cache": False, "pretraining_tp": 1, "attention_dropout": 0.0},
        {"_attn_implementation_autoset": True, "pad_token_id": 7, "initializer_range": 0.02, "mlp_bias": False},
    ],
)
def test_keys_of_published_files_that_change_nothing(own: dict[str, Any]) -> None:
    raw = json.loads(LlamaConfig(architectures=["LlamaForCausalLM"]).to_json_string())
    assert config_from_hf(raw | own) == config_from_hf(raw)


def oracle_logits(path: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([TOKENS])).logits[0]
    return logits


def assert_like_transformers(path: Path, paged: Callable[..., Any]) -> None:
    model, config = load_model(path, ModelRuntime())
    logits = paged(model, config).step({0: TOKENS})[0]
    torch.testing.assert_close(logits, oracle_logits(path), atol=1e-4, rtol=0)


def test_the_original_context_of_scaled_positions_may_stand_outside(
    hf_model: Callable[..., Any], paged: Callable[..., Any], tmp_path: Path
) -> None:
    hf_model("llama3-rope").save_pretrained(tmp_path)
    inside = oracle_logits(tmp_path)
    changed(tmp_path, original_max_position_embeddings=16)
    assert (oracle_logits(tmp_path) - inside).abs().max() > 1e-3
    assert_like_transformers(tmp_path, paged)


@pytest.mark.parametrize("family", ["llama", "mistral", "mixtral", "qwen3-moe"])
def test_layer_types_of_families_whose_layers_are_alike(
    family: str, hf_model: Callable[..., Any], tmp_path: Path
) -> None:
    hf_model(family).save_pretrained(tmp_path)
    alike = "sliding_attention" if family in ("mistral", "mixtral") else "full_attention"
    read_model_config(changed(tmp_path, layer_types=[alike] * 4))
    message = refusal(changed(tmp_path, layer_types=["sliding_attention", "full_attention"] * 2))
    assert message.startswith("config.json: layer_types is ['sliding_attention', 'full_attention'")
    assert "all layers are alike" in message


def test_layer_types_that_are_used(hf_model: Callable[..., Any], paged: Callable[..., Any], tmp_path: Path) -> None:
    hf_model("qwen2-window").save_pretrained(tmp_path)
    changed(tmp_path, layer_types=["sliding_attention", "full_attention"] * 2)
    assert_like_transformers(tmp_path, paged)
    message = refusal(changed(tmp_path, use_sliding_window=False))
    assert message == "layer_types has sliding_attention layers but sliding_window is not set"


def test_a_tied_head_that_differs_is_refused(
    hf_model: Callable[..., Any], paged: Callable[..., Any], tmp_path: Path
) -> None:
    hf_model("llama-tied-bias").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    embedding = tensors["model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": embedding.clone()}, file, metadata={"format": "pt"})
    assert_like_transformers(tmp_path, paged)
    save_file({**tensors, "lm_head.weight": embedding.flip(0)}, file, metadata={"format": "pt"})
    assert "tie_word_embeddings is true, but lm_head.weight differs from model.embed_tokens.weight" in refusal(tmp_path)
    assert_like_transformers(changed(tmp_path, tie_word_embeddings=False), paged)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral"}, "config.json: model_type is 'mistral'; that of LlamaForCausalLM is llama"),
        ({"tie_word_embeddings": "false"}, "config.json: tie_word_embeddings is 'false'; it must be true or false"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_parameters is given as well"),
        (
            {"rope_parameters": {"rope_type": "default", "mscale": 2}},
            "config.json: rope_parameters: mscale is 2; ",
        ),
        ({"rope_parameters": [1]}, "config.json: rope_parameters is [1]; it must be an object"),
        ({"rms_norm_eps": float("nan")}, "config.json: rms_norm_eps is nan; it must be a positive number"),
        ({"hidden_size": 1 << 40}, "config.json: hidden_size is 1099511627776; at most 16777216 is supported"),
    ],
)
def test_values_that_cannot_be_meant(
    change: dict[str, Any], message: str, hf_model: Callable[..., Any], tmp_path: Path
) -> None:
    hf_model("llama").save_pretrained(tmp_path)
    assert message in refusal(changed(tmp_path, **change))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("llama.logit_scale", Value(F32, 0.5), "supported: 0.0, 1.0"),
        ("llama.embedding_scale", Value(F32, 12.0), "supported: 0.0, 1.0"),
        ("llama.rope.freq_base_swa", Value(F32, 1e4), "this key is not known here"),
        ("llama.leading_dense_block_count", Value(U32, 1), "supported: 0"),
    ],
)
def test_keys_of_gguf_files(key: str, value: Value, words: str, tmp_path: Path) -> None:
    file = gguf_bases()[0]
    path = tmp_path / "model.gguf"
    path.write_bytes(file.encoded())
    read_model_config(path)
    lying = type(file)(values=[*file.values, (key, value)], tensors=file.tensors, num_bytes=file.num_bytes)
    path.write_bytes(lying.encoded())
    message = refusal(path)
    assert message.startswith(f"GGUF: {key} is ")
    assert words in message
