"""ModelConfig from a Hugging Face config.json, as written by transformers 4 or 5.

Where a key is absent the default is that of the transformers class, so that the same file means the same model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypedDict, cast

from scalellm.services.common.model_files import shown
from scalellm.services.executor.model_config.config import Activation, Architecture, ModelConfig
from scalellm.services.executor.model_config.config_keys import (
    ACCEPTED_VALUES,
    IRRELEVANT_KEYS,
    MOST_HEADS,
    MOST_LAYERS,
    MOST_POSITIONS,
    ConfigKeys,
)
from scalellm.services.executor.model_config.errors import UnsupportedModelError
from scalellm.services.executor.model_config.rope import (
    LinearScaling,
    Llama3Scaling,
    RopeConfig,
    RopeScaling,
    YarnScaling,
    yarn_attention_factor,
)

if TYPE_CHECKING:
    from scalellm.services.executor.models.linear import CheckpointFormat

_MODEL_TYPES: Mapping[Architecture, str] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "MixtralForCausalLM": "mixtral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "Gemma3ForCausalLM": "gemma3_text",
}
_GEMMA3_WITH_IMAGES = "Gemma3ForConditionalGeneration"
_KEYS_OF_IMAGES = frozenset(
    {
        *("vision_config", "mm_tokens_per_image", "image_token_index", "image_token_id"),
        *("boi_token_index", "boi_token_id", "eoi_token_index", "eoi_token_id"),
    }
)
_WITH_ATTENTION_BIAS = ("LlamaForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "Gemma3ForCausalLM")
_ROPE_TYPES = ("default", "linear", "llama3", "yarn", "dynamic")
_ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    """Return the configuration described by config.json (`raw`), all but the tokens that end an answer.

    Raises UnsupportedModelError for another architecture, an unknown quantisation, a setting outside what the decoder
    implements, and a key that is not known.
    """
    keys = ConfigKeys(raw, "config.json")
    if keys.get("architectures") == [_GEMMA3_WITH_IMAGES]:
        keys = _language_model(keys, raw)
    config = _config(keys)
    keys.refuse_unread(IRRELEVANT_KEYS, ACCEPTED_VALUES)
    return config


def _language_model(keys: ConfigKeys, raw: Mapping[str, Any]) -> ConfigKeys:
    """Return the configuration of the language model in one that reads images as well, as if it stood alone."""
    if keys.text("model_type", "gemma3") != "gemma3":
        raise keys.refusal("model_type", f"that of {_GEMMA3_WITH_IMAGES} is gemma3")
    text = raw.get("text_config") or {}
    if not isinstance(text, Mapping):
        raise keys.refusal("text_config", "it must be an object")
    of_both = {key: raw[key] for key in ("quantization_config", "tie_word_embeddings") if keys.get(key) is not None}
    keys.get("text_config")
    keys.refuse_unread(IRRELEVANT_KEYS | _KEYS_OF_IMAGES, ACCEPTED_VALUES)
    return ConfigKeys({**text, **of_both, "architectures": ["Gemma3ForCausalLM"]}, "config.json: text_config")


def _config(keys: ConfigKeys) -> ModelConfig:
    architecture = _architecture(keys)
    gemma = architecture == "Gemma3ForCausalLM"
    mixtral = architecture == "MixtralForCausalLM"
    hidden_size = keys.integer("hidden_size", 2304 if gemma else None)
    num_heads = keys.integer("num_attention_heads", 8 if gemma else None, most=MOST_HEADS)
    num_layers = keys.integer("num_hidden_layers", 26 if gemma else None, most=MOST_LAYERS)
    head_dim = keys.integer("head_dim", _default_head_dim(architecture, hidden_size, num_heads), most=MOST_HEADS)
    max_positions = keys.integer("max_position_embeddings", 131072 if gemma else None, most=MOST_POSITIONS)
    window, sliding_layers = _sliding(keys, architecture, num_layers)
    rope, local_rope = _ropes(keys, gemma, 1_000_000.0 if gemma or mixtral else 10_000.0, max_positions)
    # In Qwen2 the projections of queries, keys and values have biases whatever the file says; in the Mistrals none has.
    attention_bias = architecture in _WITH_ATTENTION_BIAS and keys.flag("attention_bias")
    query_scalar = keys.number("query_pre_attn_scalar", 256.0, positive=True) if gemma else float(head_dim)
    return ModelConfig(
        architecture=architecture,
        vocab_size=keys.integer("vocab_size", 262_208 if gemma else None),
        hidden_size=hidden_size,
        intermediate_size=keys.integer("intermediate_size", 9216 if gemma else None),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=keys.integer("num_key_value_heads", 4 if gemma else num_heads, most=MOST_HEADS),
        head_dim=head_dim,
        max_position_embeddings=_stretched(rope, max_positions),
        rms_norm_eps=keys.number("rms_norm_eps", 1e-5 if mixtral else 1e-6, positive=True),
        rope=rope,
        local_rope=local_rope,
        sliding_window=window,
        sliding_layers=sliding_layers,
        attention_scale=query_scalar**-0.5,
        qk_norm=architecture in ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "Gemma3ForCausalLM"),
        qkv_bias=architecture == "Qwen2ForCausalLM" or attention_bias,
        o_bias=attention_bias,
        activation=_activation(keys, gemma),
        tie_word_embeddings=keys.flag("tie_word_embeddings", gemma),
        embedding_scale=hidden_size**0.5 if gemma else 1.0,
        attention_softcap=keys.number("attn_logit_softcapping", 0.0) if gemma else 0.0,
        final_softcap=keys.number("final_logit_softcapping", 0.0) if gemma else 0.0,
        **_experts(keys, architecture, num_layers),
        stored_linears=_stored_linears(keys),
    )


def _stored_linears(keys: ConfigKeys) -> CheckpointFormat | None:
    for key in ("quantization_config", "compression_config"):  # the second is llm-compressor's, of 2024
        config = keys.get(key)
        if config is not None and not isinstance(config, Mapping):
            raise keys.refusal(key, "it must be an object")
        if config:
            # Not at the top: it imports torch, which takes three seconds, and an engine without weights does without.
            from scalellm.services.executor.models.hf_quantization import stored_linears

            return stored_linears(config)
    return None


def _architecture(keys: ConfigKeys) -> Architecture:
    names = keys.get("architectures") or []
    name = names[0] if isinstance(names, list) and len(names) == 1 else None
    if not isinstance(name, str) or name not in _MODEL_TYPES:
        raise UnsupportedModelError(
            f"config.json: architectures {shown(names)} is not supported; supported: {', '.join(_MODEL_TYPES)}, "
            f"{_GEMMA3_WITH_IMAGES} (its language model)"
        )
    architecture = cast(Architecture, name)
    # transformers chooses the model's class by this key.
    if keys.text("model_type", _MODEL_TYPES[architecture]) != _MODEL_TYPES[architecture]:
        raise keys.refusal("model_type", f"that of {architecture} is {_MODEL_TYPES[architecture]}")
    return architecture


def _default_head_dim(architecture: Architecture, hidden_size: int, num_heads: int) -> int:
    match architecture:
        case "Gemma3ForCausalLM":
            return 256
        case "Qwen3ForCausalLM":
            return 128
        case _:
            return hidden_size // num_heads


def _activation(keys: ConfigKeys, gemma: bool) -> Activation:
    key = "hidden_activation" if gemma else "hidden_act"
    name = keys.text(key, "gelu_pytorch_tanh" if gemma else "silu")
    if name not in _ACTIVATIONS:
        raise UnsupportedModelError(
            f"config.json: {key} {shown(name)} is not supported; supported: {', '.join(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[name]


def _sliding(keys: ConfigKeys, architecture: Architecture, num_layers: int) -> tuple[int | None, tuple[bool, ...]]:
    """Return the window and the layers that have it."""
    window: int | None = None
    default = (False,) * num_layers
    has_types = False
    match architecture:
        case "MistralForCausalLM" | "MixtralForCausalLM":
            window = _window(keys, 4096 if architecture == "MistralForCausalLM" else None)
            default = (window is not None,) * num_layers
        case "Qwen2ForCausalLM" | "Qwen3ForCausalLM" | "Qwen3MoeForCausalLM":
            window = _window(keys, 4096)
            window = window if keys.flag("use_sliding_window") else None
            first = keys.integer("max_window_layers", 28, least=0)
            has_types = architecture != "Qwen3MoeForCausalLM"
            default = tuple(window is not None and (layer >= first or not has_types) for layer in range(num_layers))
        case "Gemma3ForCausalLM":
            window = _window(keys, 4096)
            period = keys.integer("sliding_window_pattern", keys.integer("_sliding_window_pattern", 6))
            default = tuple((layer + 1) % period != 0 for layer in range(num_layers))
            has_types = True
    named = _layer_types(keys)
    if named is not None and named != default and not has_types:
        # transformers ignores the list in these families.
        raise keys.refusal("layer_types", f"in {architecture} all layers are alike")
    return window, default if named is None else named


def _window(keys: ConfigKeys, default: int | None) -> int | None:
    """Return `sliding_window`, for which a null is a value: no window."""
    if keys.get("sliding_window") is None and (default is None or keys.has("sliding_window")):
        return None
    return keys.integer("sliding_window", default, most=MOST_POSITIONS)


def _layer_types(keys: ConfigKeys) -> tuple[bool, ...] | None:
    names = keys.items("layer_types", str)
    unknown = sorted(set(names) - {"sliding_attention", "full_attention"})
    if unknown:
        raise UnsupportedModelError(
            f"config.json: layer_types has {', '.join(unknown)[:100]}; supported: full_attention, sliding_attention"
        )
    return tuple(name == "sliding_attention" for name in names) or None


def _ropes(keys: ConfigKeys, gemma: bool, default_theta: float, max_positions: int) -> tuple[RopeConfig, RopeConfig]:
    """Return the rotary settings of the full and of the sliding layers.

    transformers 5 writes `rope_parameters`, for Gemma 3 one dictionary per layer type; transformers 4 wrote
    `rope_theta`, `rope_local_base_freq` and a `rope_scaling` that never applied to Gemma's sliding layers.
    """
    theta = keys.number("rope_theta", default_theta, positive=True)
    scaling, parameters = keys.part("rope_scaling"), keys.part("rope_parameters")
    if not gemma:
        if scaling is not None and parameters is not None:
            raise keys.refusal("rope_scaling", "rope_parameters is given as well")
        # Beside the rotary settings this key counts before one among them, as in transformers.
        outer = keys if keys.get("original_max_position_embeddings") is not None else None
        rope = _rope(scaling or parameters, theta, max_positions, outer)
        return rope, rope
    full = None if parameters is None else parameters.part("full_attention")
    local = None if parameters is None else parameters.part("sliding_attention")
    if scaling is not None and full is not None:
        raise keys.refusal("rope_scaling", "rope_parameters is given as well")
    local_theta = keys.number("rope_local_base_freq", 10_000.0, positive=True)
    return _rope(scaling or full, theta, max_positions), _rope(local, local_theta, max_positions)


def _rope(
    keys: ConfigKeys | None, default_theta: float, max_positions: int, outer: ConfigKeys | None = None
) -> RopeConfig:
    if keys is None:
        return RopeConfig(default_theta)
    kind = keys.text("rope_type", keys.text("type", "default"))
    original = keys.integer("original_max_position_embeddings", max_positions, most=MOST_POSITIONS)
    if outer is not None:
        original = outer.integer("original_max_position_embeddings", most=MOST_POSITIONS)
    scaling: RopeScaling | None
    match kind:
        case "default":
            scaling = None
        case "linear":
            scaling = LinearScaling(keys.number("factor", positive=True))
        case "llama3":
            scaling = Llama3Scaling(
                factor=keys.number("factor", positive=True),
                low_freq_factor=keys.number("low_freq_factor", positive=True),
                high_freq_factor=keys.number("high_freq_factor", positive=True),
                original_max_position_embeddings=original,
            )
            if scaling.low_freq_factor == scaling.high_freq_factor:
                raise keys.refusal("high_freq_factor", "it must differ from low_freq_factor")
        case "dynamic":
            # Frequencies change where a context is longer than max_position_embeddings, which none is here.
            keys.number("factor", positive=True)
            scaling = None
        case "yarn":
            scaling = _yarn(keys, original, max_positions)
        case _:
            raise UnsupportedModelError(
                f"config.json: rope type {shown(kind)} is not supported; supported: {', '.join(_ROPE_TYPES)}"
            )
    return RopeConfig(keys.number("rope_theta", default_theta, positive=True), scaling)


def _yarn(keys: ConfigKeys, original: int, max_positions: int) -> YarnScaling:
    factor = keys.number("factor", max_positions / original, positive=True)
    mscale, of_all = keys.number("mscale", 0.0), keys.number("mscale_all_dim", 0.0)
    attention_factor = yarn_attention_factor(factor)
    if mscale and of_all:
        attention_factor = yarn_attention_factor(factor, mscale) / yarn_attention_factor(factor, of_all)
    return YarnScaling(
        factor=factor,
        original_max_position_embeddings=original,
        attention_factor=keys.number("attention_factor", attention_factor, positive=True),
        beta_fast=keys.number("beta_fast", 32.0, positive=True),
        beta_slow=keys.number("beta_slow", 1.0, positive=True),
        truncate=keys.flag("truncate", True),
    )


def _stretched(rope: RopeConfig, max_positions: int) -> int:
    """The longest context: what YaRN stretches the original one to, where the file still has that one, as in vLLM."""
    if not isinstance(scaling := rope.scaling, YarnScaling):
        return max_positions
    return min(MOST_POSITIONS, max(max_positions, int(scaling.factor * scaling.original_max_position_embeddings)))


class _Experts(TypedDict, total=False):
    """The fields of a ModelConfig that a dense model leaves out."""

    num_experts: int
    num_experts_per_token: int
    moe_intermediate_size: int
    norm_topk_prob: bool
    sparse_layers: tuple[bool, ...]


def _experts(keys: ConfigKeys, architecture: Architecture, num_layers: int) -> _Experts:
    """Return the experts; transformers 5 writes Qwen3-MoE's `num_experts` as Mixtral's `num_local_experts`."""
    match architecture:
        case "MixtralForCausalLM":
            return {
                "num_experts": keys.integer("num_local_experts", 8),
                "num_experts_per_token": keys.integer("num_experts_per_tok", 2),
                "moe_intermediate_size": keys.integer("intermediate_size"),
                "norm_topk_prob": True,
                "sparse_layers": (True,) * num_layers,
            }
        case "Qwen3MoeForCausalLM":
            step = keys.integer("decoder_sparse_step", 1)
            dense = keys.items("mlp_only_layers", int)
            return {
                "num_experts": keys.integer("num_local_experts", keys.integer("num_experts", 128)),
                "num_experts_per_token": keys.integer("num_experts_per_tok", 8),
                "moe_intermediate_size": keys.integer("moe_intermediate_size", 768),
                "norm_topk_prob": keys.flag("norm_topk_prob"),
                "sparse_layers": tuple(i not in dense and (i + 1) % step == 0 for i in range(num_layers)),
            }
        case _:
            return {}
