"""config.json as published on the Hub by transformers 4, against what transformers 5 makes of the same file."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from scalellm.services.executor.model_config.hf_config import config_from_hf
from scalellm.services.executor.model_config.rope import FrequencyFactors, Llama3Scaling, RopeConfig, YarnScaling
from scalellm.services.executor.models.context import kv_bytes_per_token
from scalellm.services.executor.models.rope import inverse_frequencies
from scalellm.services.executor.weights import read_model_config

CPU = torch.device("cpu")

LLAMA_32_1B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "vocab_size": 128256,
}
MISTRAL_7B: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
QWEN2_05B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3_06B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
GEMMA3_1B: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "eos_token_id": [1, 106],
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "vocab_size": 262144,
}
VARIANTS = {
    "llama-3.2": LLAMA_32_1B,
    "llama-linear": {**LLAMA_32_1B, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama-dynamic": {**LLAMA_32_1B, "rope_scaling": {"type": "dynamic", "factor": 4.0}},
    "qwen3-yarn": {
        **QWEN3_06B,
        "max_position_embeddings": 131072,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    },
    "llama-2": {**LLAMA_32_1B, "rope_scaling": None, "head_dim": None, "num_key_value_heads": None},
    "mistral-0.1": MISTRAL_7B,
    "mistral-0.3": {**MISTRAL_7B, "sliding_window": None, "head_dim": 128, "rope_theta": 1000000.0},
    "qwen2": QWEN2_05B,
    "qwen2-window": {**QWEN2_05B, "use_sliding_window": True},
    "qwen3": QWEN3_06B,
    "qwen3-layer-types": {
        **QWEN3_06B,
        "use_sliding_window": True,
        "sliding_window": 128,
        "layer_types": ["full_attention", "sliding_attention"] * 14,
    },
    "gemma3-1b": GEMMA3_1B,
    "gemma3-scaled": {**GEMMA3_1B, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    "gemma3-pattern": {**GEMMA3_1B, "sliding_window_pattern": 4, "query_pre_attn_scalar": 168},
    "gemma3-defaults": {
        key: GEMMA3_1B[key]
        for key in (
            *("architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
            *("num_attention_heads", "num_key_value_heads", "bos_token_id", "eos_token_id"),
        )
    },
}


@pytest.mark.parametrize("name", VARIANTS)
def test_both_styles_mean_the_same(name: str, tmp_path: Path) -> None:
    raw = VARIANTS[name]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    rewritten = AutoConfig.from_pretrained(tmp_path)
    rewritten.save_pretrained(tmp_path / "v5")
    new_style = json.loads((tmp_path / "v5" / "config.json").read_text())
    assert "rope_parameters" in new_style
    assert "rope_theta" not in new_style

    ours, theirs = read_model_config(tmp_path), read_model_config(tmp_path / "v5")
    # Where no layer slides, the window and the local rope are never used.
    assert theirs == ours or replace(theirs, sliding_window=ours.sliding_window) == ours
    assert ours.num_kv_heads == rewritten.num_key_value_heads
    assert ours.max_position_embeddings == rewritten.max_position_embeddings
    layer_types = getattr(rewritten, "layer_types", None)
    if layer_types is not None:
        assert ours.sliding_layers == tuple(kind == "sliding_attention" for kind in layer_types)
    assert ours.attention_scale == getattr(rewritten, "query_pre_attn_scalar", ours.head_dim) ** -0.5


def test_windows_and_ropes_per_layer() -> None:
    config = config_from_hf(VARIANTS["gemma3-scaled"])
    assert [config.layer_window(layer) for layer in range(7)] == [512, 512, 512, 512, 512, 0, 512]
    assert config.layer_rope(0) == RopeConfig(10_000.0)
    assert config.layer_rope(5).theta == 1_000_000.0
    assert config.layer_rope(5).scaling is not None


def test_tokens_that_end_an_answer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_32_1B))
    assert read_model_config(tmp_path).eos_token_ids == (128001, 128008, 128009)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert read_model_config(tmp_path).eos_token_ids == (7, 128001, 128008, 128009)


def test_kv_bytes_per_token() -> None:
    # Llama 3.2 1B: 16 layers, 8 kv heads of 64, keys and values, 2 bytes each.
    assert kv_bytes_per_token(config_from_hf(LLAMA_32_1B), torch.bfloat16) == 32768


@given(
    theta=st.floats(1e3, 1e6),
    factor=st.floats(1.0, 64.0),
    low=st.floats(0.5, 2.0),
    span=st.floats(0.5, 8.0),
    original=st.integers(16, 16384),
    head_dim=st.sampled_from([16, 64, 128, 256]),
)
def test_llama3_frequencies(theta: float, factor: float, low: float, span: float, original: int, head_dim: int) -> None:
    parameters = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": low + span,
        "original_max_position_embeddings": original,
    }
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](
        LlamaConfig(
            hidden_size=head_dim, num_attention_heads=1, max_position_embeddings=131072, rope_parameters=parameters
        ),
        device=CPU,
    )
    rope = RopeConfig(theta, Llama3Scaling(factor, low, low + span, original))
    torch.testing.assert_close(inverse_frequencies(rope, head_dim), expected, rtol=2e-5, atol=0)

    # The same as a GGUF file carries it: what each frequency is divided by.
    factors = inverse_frequencies(RopeConfig(theta), head_dim) / expected
    as_gguf = RopeConfig(theta, FrequencyFactors(tuple(factors.tolist())))
    torch.testing.assert_close(inverse_frequencies(as_gguf, head_dim), expected, rtol=2e-5, atol=0)


@given(
    theta=st.floats(1e3, 1e7),
    factor=st.floats(1.0, 64.0),
    beta_slow=st.floats(0.5, 4.0),
    span=st.floats(1.0, 64.0),
    original=st.integers(64, 65536),
    head_dim=st.sampled_from([16, 64, 128, 256]),
    given=st.fixed_dictionaries(
        {},
        optional={
            "truncate": st.booleans(),
            "attention_factor": st.floats(0.5, 2.0),
            "mscale": st.floats(0.5, 2.0),
            "mscale_all_dim": st.floats(0.5, 2.0),
        },
    ),
)
def test_yarn_frequencies(
    theta: float, factor: float, beta_slow: float, span: float, original: int, head_dim: int, given: dict[str, Any]
) -> None:
    parameters = {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": factor,
        "beta_slow": beta_slow,
        "beta_fast": beta_slow + span,
        "original_max_position_embeddings": original,
        **given,
    }
    raw = {"hidden_size": head_dim, "num_attention_heads": 1, "max_position_embeddings": 131072}
    oracle = LlamaConfig(**raw, rope_parameters=dict(parameters))
    expected, attention_factor = ROPE_INIT_FUNCTIONS["yarn"](oracle, device=CPU)
    config = config_from_hf(
        {
            **LLAMA_32_1B,
            **raw,
            "head_dim": head_dim,
            "num_key_value_heads": 1,
            "rope_scaling": None,
            "rope_parameters": parameters,
        }
    )
    assert isinstance(config.rope.scaling, YarnScaling)
    assert config.rope.attention_factor == pytest.approx(attention_factor)
    torch.testing.assert_close(inverse_frequencies(config.rope, head_dim), expected, rtol=2e-5, atol=0)
    assert config.max_position_embeddings == max(131072, int(factor * original))


def test_yarn_stretches_the_context_of_a_file_that_has_the_original_one() -> None:
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    raw = {**QWEN3_06B, "max_position_embeddings": 40960, "rope_scaling": scaling}
    assert config_from_hf(raw).max_position_embeddings == 131072
    assert config_from_hf({**raw, "rope_scaling": {"type": "yarn", "factor": 2.0}}).max_position_embeddings == 81920
