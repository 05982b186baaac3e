"""Random weights, and the shapes of published models to fill with them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from scalellm.services.executor.model_config.hf_config import config_from_hf
from scalellm.services.executor.models import (
    PRESETS,
    ModelConfig,
    ModelRuntime,
    Quantization,
    UnsupportedModelError,
    dummy_model,
    preset_config,
)
from scalellm.services.executor.weights import weight_bytes


def small(config: ModelConfig) -> ModelConfig:
    """Return the same kind of model, a few hundred times smaller."""
    layers = 3
    sparse = config.sparse_layers[:layers]
    return replace(
        config,
        vocab_size=300,
        hidden_size=128,
        intermediate_size=384,
        num_layers=layers,
        num_heads=8,
        num_kv_heads=2,
        head_dim=16,
        attention_scale=0.25,
        sliding_layers=(False,) * layers,
        sparse_layers=sparse,
        moe_intermediate_size=256 if sparse else 0,
    )


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("method", ["none", "fp8", "int8", "int4"])
def test_activations_keep_their_size(preset: str, method: Any, paged: Callable[..., Any]) -> None:
    config = small(PRESETS[preset])
    runtime = ModelRuntime(dtype=torch.bfloat16, quantization=Quantization(method))
    model = dummy_model(config, runtime, max_model_len=64)
    assert model.num_bytes() == weight_bytes(config, runtime, max_model_len=64)
    tokens = torch.randint(300, (20,), generator=torch.Generator().manual_seed(0)).tolist()
    logits = paged(model, config, kv_dtype=torch.bfloat16).step({0: tokens})[0]
    assert 0.3 < logits.std() < 3
    qkv = model._layers[0].self_attn.qkv_proj(torch.randn(4, 128, dtype=torch.bfloat16))
    assert 0.7 < qkv.std() < 1.4
    again = dummy_model(config, runtime, max_model_len=64)
    assert torch.equal(paged(again, config, kv_dtype=torch.bfloat16).step({0: tokens})[0], logits)
    other = dummy_model(config, runtime, seed=1, max_model_len=64)
    assert not torch.equal(paged(other, config, kv_dtype=torch.bfloat16).step({0: tokens})[0], logits)


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [("llama-3.1-8b", 8_030_261_248), ("qwen3-8b", 8_190_735_360), ("mixtral-8x7b", 46_702_792_704)],
)
def test_presets_have_the_published_number_of_parameters(preset: str, parameters: int) -> None:
    config = preset_config(preset)
    table = 4 * config.head_dim
    assert weight_bytes(config, ModelRuntime(dtype=torch.bfloat16), max_model_len=1) == 2 * parameters + table


def test_presets_are_what_their_config_says() -> None:
    llama = {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009],
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "vocab_size": 128256,
    }
    qwen = {
        "architectures": ["Qwen3ForCausalLM"],
        "bos_token_id": 151643,
        "eos_token_id": [151645, 151643],
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "max_position_embeddings": 40960,
        "max_window_layers": 36,
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": 151936,
    }
    mixtral = {
        "architectures": ["MixtralForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "num_attention_heads": 32,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    }
    for name, raw in (("llama-3.1-8b", llama), ("qwen3-8b", qwen), ("mixtral-8x7b", mixtral)):
        assert replace(preset_config(name), eos_token_ids=()) == config_from_hf(raw)


def test_unknown_preset() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'llama' is not known; known: llama-3\.1-8b, qwen3-8b, mixtral-8"):
        preset_config("llama")
