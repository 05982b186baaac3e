"""ModelConfig from the metadata of a GGUF file (key names: the GGUF specification of the ggml project)."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from scalellm.services.common.model_files import shown
from scalellm.services.executor.model_config.config import Architecture, ModelConfig
from scalellm.services.executor.model_config.config_keys import (
    ACCEPTED_GGUF_VALUES,
    IRRELEVANT_GGUF_KEYS,
    MOST_HEADS,
    MOST_LAYERS,
    MOST_POSITIONS,
    ConfigKeys,
)
from scalellm.services.executor.model_config.errors import UnsupportedModelError
from scalellm.services.executor.model_config.rope import (
    FrequencyFactors,
    LinearScaling,
    RopeConfig,
    RopeScaling,
    YarnScaling,
    yarn_attention_factor,
)

# GGUF's `llama` covers Mistral too: the two differ by a sliding window at most, which is a setting here. With experts
# it is Mixtral.
_ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3moe": "Qwen3MoeForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
}
_GEMMA3_LOCAL_THETA = 10_000.0
_GEMMA3_PERIOD = 6
_GEMMA3_27B_LAYERS = 62
_SOFTMAX_ROUTING = 1


def config_from_gguf(
    metadata: Mapping[str, Any],
    tensor_names: Collection[str],
    vocab_size: int,
    rope_factors: Sequence[float] | None = None,
) -> ModelConfig:
    """Return the configuration of a GGUF file, all but the tokens that end an answer.

    `metadata` maps keys to values, `vocab_size` is the number of rows of the embedding (the truth where the metadata
    is silent), `rope_factors` the tensor `rope_freqs.weight` if there is one. Raises UnsupportedModelError.
    """
    arch = metadata.get("general.architecture")
    if not isinstance(arch, str) or arch not in _ARCHITECTURES:
        raise UnsupportedModelError(
            f"GGUF: general.architecture {shown(arch)} is not supported; supported: {', '.join(_ARCHITECTURES)}"
        )
    tokens = metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and len(tokens) > vocab_size:
        raise UnsupportedModelError(
            f"GGUF: tokenizer.ggml.tokens has {len(tokens)} entries, token_embd.weight has rows for {vocab_size}"
        )
    keys = _Keys(metadata, arch)
    config = _config(keys, arch, tensor_names, vocab_size, rope_factors)
    keys.refuse_unread(IRRELEVANT_GGUF_KEYS, ACCEPTED_GGUF_VALUES, prefix=f"{arch}.")
    return config


def _config(
    get: "_Keys", arch: str, tensor_names: Collection[str], vocab_size: int, rope_factors: Sequence[float] | None
) -> ModelConfig:
    num_experts = _num_experts(get)
    gemma = arch == "gemma3"
    hidden_size = get.integer("embedding_length")
    num_layers = get.integer("block_count", most=MOST_LAYERS)
    num_heads = get.integer("attention.head_count", most=MOST_HEADS)
    head_dim = get.integer("attention.key_length", hidden_size // num_heads or None, most=MOST_HEADS)
    if get.integer("attention.value_length", head_dim) != head_dim:
        raise UnsupportedModelError(f"GGUF: {arch}.attention.value_length differs from key_length ({head_dim})")
    if get.integer("rope.dimension_count", head_dim) != head_dim:
        raise UnsupportedModelError(f"GGUF: {arch}.rope.dimension_count must equal the head dimension ({head_dim})")
    theta = get.number("rope.freq_base", 1_000_000.0 if gemma else 10_000.0, positive=True)
    rope = RopeConfig(theta, _scaling(get, rope_factors))
    # The file does not carry Gemma's query_pre_attn_scalar. It is head_dim in every Gemma 3 but the 27B.
    query_scalar = hidden_size // num_heads if gemma and num_layers == _GEMMA3_27B_LAYERS else head_dim
    # The Qwen families may carry a window that the model does not use; llama.cpp ignores it there as well.
    window = get.integer("attention.sliding_window", 0, least=0, most=MOST_POSITIONS)
    window = window if arch in ("llama", "gemma3") else 0
    sliding_layers = _sliding_layers(get, gemma, num_layers)
    scale = get.number("attention.scale", 0.0)
    if scale < 0:
        raise get.refusal(f"{arch}.attention.scale", "it must not be negative")
    return ModelConfig(
        architecture="MixtralForCausalLM" if arch == "llama" and num_experts else _ARCHITECTURES[arch],
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=get.integer("feed_forward_length"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=get.integer("attention.head_count_kv", num_heads, most=MOST_HEADS),
        head_dim=head_dim,
        max_position_embeddings=get.integer("context_length", most=MOST_POSITIONS),
        rms_norm_eps=get.number("attention.layer_norm_rms_epsilon", positive=True),
        rope=rope,
        local_rope=RopeConfig(get.number("rope.freq_base_swa", _GEMMA3_LOCAL_THETA, positive=True)) if gemma else rope,
        sliding_window=window or None,
        sliding_layers=sliding_layers if window else (False,) * num_layers,
        attention_scale=scale or query_scalar**-0.5,
        qk_norm=arch in ("qwen3", "qwen3moe", "gemma3"),
        qkv_bias="blk.0.attn_q.bias" in tensor_names,
        o_bias="blk.0.attn_output.bias" in tensor_names,
        activation="gelu_tanh" if gemma else "silu",
        tie_word_embeddings="output.weight" not in tensor_names,
        embedding_scale=hidden_size**0.5 if gemma else 1.0,
        attention_softcap=get.number("attn_logit_softcapping", 0.0),
        final_softcap=get.number("final_logit_softcapping", 0.0),
        num_experts=num_experts,
        num_experts_per_token=get.integer("expert_used_count") if num_experts else 0,
        moe_intermediate_size=_expert_size(get) if num_experts else 0,
        norm_topk_prob=num_experts > 0,  # of both families; the file does not say
        sparse_layers=tuple(f"blk.{i}.ffn_gate_inp.weight" in tensor_names for i in range(num_layers))
        if num_experts
        else (),
    )


def _num_experts(get: "_Keys") -> int:
    """Return the number of experts, 0 for a dense model, when the routing is what the expert layer implements."""
    num_experts = get.integer("expert_count") if get.arch == "qwen3moe" else get.integer("expert_count", 0, least=0)
    if num_experts and get.arch not in ("llama", "qwen3moe"):
        raise UnsupportedModelError(f"GGUF: {get.arch}.expert_count is set; only llama and qwen3moe may have experts")
    if get.integer("expert_shared_count", 0, least=0):
        raise UnsupportedModelError(f"GGUF: {get.arch}.expert_shared_count is set; shared experts are not supported")
    if get.integer("expert_gating_func", 0, least=0) not in (0, _SOFTMAX_ROUTING):
        raise UnsupportedModelError(f"GGUF: {get.arch}.expert_gating_func is not softmax, the only one supported")
    if get.number("expert_weights_scale", 0.0) not in (0.0, 1.0):
        raise UnsupportedModelError(f"GGUF: {get.arch}.expert_weights_scale is not supported; it must be 1")
    return num_experts


def _expert_size(get: "_Keys") -> int:
    """Mixtral's experts are as wide as a dense MLP would be."""
    return get.integer("feed_forward_length" if get.arch == "llama" else "expert_feed_forward_length")


def _sliding_layers(get: "_Keys", gemma: bool, num_layers: int) -> tuple[bool, ...]:
    """Mistral slides everywhere; Gemma by a period or, in newer files, by a list with one flag per layer."""
    pattern = get.get(f"{get.arch}.attention.sliding_window_pattern")
    if isinstance(pattern, list):
        return tuple(bool(slides) for slides in pattern)
    if not gemma:
        return (True,) * num_layers
    period = get.integer("attention.sliding_window_pattern", _GEMMA3_PERIOD)
    return tuple((layer + 1) % period != 0 for layer in range(num_layers))


def _scaling(get: "_Keys", rope_factors: Sequence[float] | None) -> RopeScaling | None:
    # As in llama.cpp: the type defaults to linear, a factor of 0 means none, and both kinds of scaling multiply.
    kind = get.get(f"{get.arch}.rope.scaling.type", "linear")
    if kind == "yarn" and rope_factors is None:
        return _yarn(get)
    if kind not in ("none", "linear"):
        raise UnsupportedModelError(
            f"GGUF: {get.arch}.rope.scaling.type {shown(kind)} is not supported; "
            "supported: none, linear, yarn, rope_freqs.weight"
        )
    factor, older = get.number("rope.scaling.factor", 0.0), get.number("rope.scale_linear", 0.0)
    if factor < 0 or older < 0:
        raise get.refusal(f"{get.arch}.rope.scaling.factor", "it must not be negative")
    linear = factor or older or 1.0
    linear = 1.0 if kind == "none" else linear
    if rope_factors is not None:
        if not all(1e-6 < factor < math.inf for factor in rope_factors):
            raise UnsupportedModelError("GGUF: rope_freqs.weight has values that cannot divide a frequency")
        return FrequencyFactors(tuple(linear * factor for factor in rope_factors))
    return None if linear == 1.0 else LinearScaling(linear)


def _yarn(get: "_Keys") -> YarnScaling:
    """Return YaRN's settings, read as in llama.cpp. Two further keys are refused unless they have their defaults, as
    in all published models.
    """
    for key, default in (("yarn_ext_factor", 1.0), ("yarn_log_multiplier", 0.0)):
        if get.number(f"rope.scaling.{key}", default) != default:
            raise get.refusal(f"{get.arch}.rope.scaling.{key}", f"it must be {default:g}")
    factor = get.number("rope.scaling.factor", positive=True)
    return YarnScaling(
        factor=factor,
        original_max_position_embeddings=get.integer(
            "rope.scaling.original_context_length", get.integer("context_length"), most=MOST_POSITIONS
        ),
        attention_factor=yarn_attention_factor(factor)
        * get.number("rope.scaling.yarn_attn_factor", 1.0, positive=True),
        beta_fast=get.number("rope.scaling.yarn_beta_fast", 32.0, positive=True),
        beta_slow=get.number("rope.scaling.yarn_beta_slow", 1.0, positive=True),
    )


class _Keys(ConfigKeys):
    """The keys of a file; those of numbers go by their names under `<architecture>.`."""

    def __init__(self, metadata: Mapping[str, Any], arch: str) -> None:
        super().__init__(metadata, "GGUF")
        self.arch = arch

    def integer(self, key: str, default: int | None = None, **limits: int) -> int:
        """Return an integer."""
        return super().integer(f"{self.arch}.{key}", default, **limits)

    def number(self, key: str, default: float | None = None, **limits: bool) -> float:
        """Return a number."""
        return super().number(f"{self.arch}.{key}", default, **limits)
