"""Shapes of published models, for runs with random weights."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from scalellm.services.executor.model_config.config import ModelConfig
from scalellm.services.executor.model_config.errors import UnsupportedModelError
from scalellm.services.executor.model_config.rope import Llama3Scaling, RopeConfig


def preset_config(name: str) -> ModelConfig:
    """Return the configuration of a published model; raise UnsupportedModelError for one that is not known."""
    if name not in PRESETS:
        raise UnsupportedModelError(f"preset {name!r} is not known; known: {', '.join(PRESETS)}")
    return PRESETS[name]


def _config(*, num_layers: int, rope: RopeConfig, **own: Any) -> ModelConfig:
    """Return a model of 8 billion parameters' width, without windows, biases or caps, whose matrices are its own."""
    head_dim = 128
    return ModelConfig(
        hidden_size=4096,
        num_layers=num_layers,
        num_heads=32,
        num_kv_heads=8,
        head_dim=head_dim,
        rope=rope,
        local_rope=rope,
        sliding_window=None,
        sliding_layers=(False,) * num_layers,
        attention_scale=head_dim**-0.5,
        qkv_bias=False,
        o_bias=False,
        activation="silu",
        tie_word_embeddings=False,
        embedding_scale=1.0,
        attention_softcap=0.0,
        final_softcap=0.0,
        **own,
    )


PRESETS: Mapping[str, ModelConfig] = MappingProxyType(
    {
        "llama-3.1-8b": _config(
            architecture="LlamaForCausalLM",
            vocab_size=128_256,
            intermediate_size=14_336,
            num_layers=32,
            max_position_embeddings=131_072,
            rms_norm_eps=1e-5,
            rope=RopeConfig(500_000.0, Llama3Scaling(8.0, 1.0, 4.0, 8192)),
            qk_norm=False,
            eos_token_ids=(128_001, 128_008, 128_009),
        ),
        "qwen3-8b": _config(
            architecture="Qwen3ForCausalLM",
            vocab_size=151_936,
            intermediate_size=12_288,
            num_layers=36,
            max_position_embeddings=40_960,
            rms_norm_eps=1e-6,
            rope=RopeConfig(1_000_000.0),
            qk_norm=True,
            eos_token_ids=(151_645, 151_643),
        ),
        "mixtral-8x7b": _config(
            architecture="MixtralForCausalLM",
            vocab_size=32_000,
            intermediate_size=14_336,
            num_layers=32,
            max_position_embeddings=32_768,
            rms_norm_eps=1e-5,
            rope=RopeConfig(1_000_000.0),
            qk_norm=False,
            eos_token_ids=(2,),
            num_experts=8,
            num_experts_per_token=2,
            moe_intermediate_size=14_336,
            norm_topk_prob=True,
            sparse_layers=(True,) * 32,
        ),
    }
)
