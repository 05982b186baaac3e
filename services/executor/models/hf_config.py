"""ModelConfig from a Hugging Face config.json, as written by transformers 4 or 5.

Where a key is absent the default is that of the transformers class, so that the same file means the same model.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, cast, get_args

from services.executor.models.config import Activation, Architecture, ModelConfig, check_num_layers
from services.executor.models.errors import UnsupportedModelError
from services.executor.models.hf_quantization import stored_linears
from services.executor.models.linear import CheckpointFormat
from services.executor.models.rope import LinearScaling, Llama3Scaling, RopeConfig, RopeScaling

_ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    """Return the configuration described by config.json (`raw`), all but the tokens that end an answer.

    Raises UnsupportedModelError for another architecture, an unknown quantisation, or a setting outside what the
    decoder implements.
    """
    architecture = _architecture(raw)
    if raw.get("mlp_bias"):
        raise UnsupportedModelError("config.json: mlp_bias is not supported; the MLP must have no bias")
    if raw.get("use_bidirectional_attention"):
        raise UnsupportedModelError("config.json: use_bidirectional_attention is not supported; attention is causal")

    gemma = architecture == "Gemma3ForCausalLM"
    mixtral = architecture == "MixtralForCausalLM"
    hidden_size = _positive_int(raw, "hidden_size")
    num_heads = _positive_int(raw, "num_attention_heads")
    num_layers = check_num_layers(_positive_int(raw, "num_hidden_layers"))
    head_dim = _positive_int(raw, "head_dim", _default_head_dim(architecture, hidden_size, num_heads))
    max_positions = _positive_int(raw, "max_position_embeddings", 131072 if gemma else None)
    window, sliding_layers = _sliding(raw, architecture, num_layers)
    theta = 1_000_000.0 if gemma or mixtral else 10_000.0
    rope, local_rope = _ropes(raw, gemma, theta, max_positions)
    attention_bias = bool(raw.get("attention_bias", False))
    query_scalar = float(raw.get("query_pre_attn_scalar") or 256) if gemma else float(head_dim)
    return ModelConfig(
        architecture=architecture,
        vocab_size=_positive_int(raw, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_positive_int(raw, "intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=_positive_int(raw, "num_key_value_heads", num_heads),
        head_dim=head_dim,
        max_position_embeddings=max_positions,
        rms_norm_eps=_number(raw, "rms_norm_eps", 1e-5 if mixtral else 1e-6),
        rope=rope,
        local_rope=local_rope,
        sliding_window=window,
        sliding_layers=sliding_layers,
        attention_scale=query_scalar**-0.5,
        qk_norm=architecture in ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "Gemma3ForCausalLM"),
        qkv_bias=architecture == "Qwen2ForCausalLM" or attention_bias,
        o_bias=architecture != "Qwen2ForCausalLM" and attention_bias,
        activation=_activation(raw, gemma),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", gemma)),
        embedding_scale=hidden_size**0.5 if gemma else 1.0,
        attention_softcap=_number(raw, "attn_logit_softcapping", 0.0) if gemma else 0.0,
        final_softcap=_number(raw, "final_logit_softcapping", 0.0) if gemma else 0.0,
        **_experts(raw, architecture, num_layers),
        stored_linears=_stored_linears(raw),
    )


def _stored_linears(raw: Mapping[str, Any]) -> CheckpointFormat | None:
    key = "quantization_config" if raw.get("quantization_config") else "compression_config"  # llm-compressor's, of 2024
    config = raw.get(key)
    if config is not None and not isinstance(config, Mapping):
        raise UnsupportedModelError(f"config.json: {key} is {config!r}; it must be an object")
    return stored_linears(config) if config else None


def _architecture(raw: Mapping[str, Any]) -> Architecture:
    supported = get_args(Architecture)
    names = raw.get("architectures") or []
    if len(names) != 1 or names[0] not in supported:
        raise UnsupportedModelError(
            f"config.json: architectures {names!r} is not supported; supported: {', '.join(supported)}"
        )
    return cast(Architecture, names[0])


def _default_head_dim(architecture: Architecture, hidden_size: int, num_heads: int) -> int:
    match architecture:
        case "Gemma3ForCausalLM":
            return 256
        case "Qwen3ForCausalLM":
            return 128
        case _:
            return hidden_size // num_heads


def _activation(raw: Mapping[str, Any], gemma: bool) -> Activation:
    key = "hidden_activation" if gemma else "hidden_act"
    name = raw.get(key) or ("gelu_pytorch_tanh" if gemma else "silu")
    if name not in _ACTIVATIONS:
        raise UnsupportedModelError(
            f"config.json: {key} {name!r} is not supported; supported: {', '.join(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[name]


def _sliding(
    raw: Mapping[str, Any], architecture: Architecture, num_layers: int
) -> tuple[int | None, tuple[bool, ...]]:
    everywhere_full = (None, (False,) * num_layers)
    match architecture:
        case "LlamaForCausalLM":
            return everywhere_full
        case "MistralForCausalLM":
            window = _optional_window(raw)
            return window, (window is not None,) * num_layers
        case "MixtralForCausalLM":
            window = _optional_window(raw, None)
            return window, (window is not None,) * num_layers
        case "Qwen3MoeForCausalLM":
            window = _optional_window(raw) if raw.get("use_sliding_window") else None
            return window, (window is not None,) * num_layers
        case "Qwen2ForCausalLM" | "Qwen3ForCausalLM":
            window = _optional_window(raw) if raw.get("use_sliding_window") else None
            if window is None:
                return everywhere_full
            first = int(raw.get("max_window_layers", 28))
            default = tuple(layer >= first for layer in range(num_layers))
        case "Gemma3ForCausalLM":
            window = _optional_window(raw)
            pattern = int(raw.get("sliding_window_pattern") or 6)
            default = tuple((layer + 1) % pattern != 0 for layer in range(num_layers))
    return window, _layer_types(raw["layer_types"]) if raw.get("layer_types") else default


def _optional_window(raw: Mapping[str, Any], default: int | None = 4096) -> int | None:
    return None if raw.get("sliding_window", default) is None else _positive_int(raw, "sliding_window", default)


def _layer_types(names: Sequence[str]) -> tuple[bool, ...]:
    unknown = sorted(set(names) - {"sliding_attention", "full_attention"})
    if unknown:
        raise UnsupportedModelError(
            f"config.json: layer_types has {', '.join(unknown)}; supported: full_attention, sliding_attention"
        )
    return tuple(name == "sliding_attention" for name in names)


def _ropes(
    raw: Mapping[str, Any], gemma: bool, default_theta: float, max_positions: int
) -> tuple[RopeConfig, RopeConfig]:
    """Return the rotary settings of the full and of the sliding layers.

    transformers 5 writes `rope_parameters`, for Gemma 3 one dictionary per layer type; transformers 4 wrote
    `rope_theta`, `rope_local_base_freq` and a `rope_scaling` that never applied to Gemma's sliding layers.
    """
    if raw.get("partial_rotary_factor", 1.0) not in (None, 1.0):
        raise UnsupportedModelError("config.json: partial_rotary_factor is not supported; it must be 1")
    theta = _number(raw, "rope_theta", default_theta)
    local_theta = _number(raw, "rope_local_base_freq", 10_000.0)
    parameters = raw.get("rope_parameters") or {}
    if not gemma:
        rope = _rope(raw.get("rope_scaling") or parameters, theta, max_positions)
        return rope, rope
    full = {**(parameters.get("full_attention") or {}), **(raw.get("rope_scaling") or {})}
    local = parameters.get("sliding_attention") or {}
    return _rope(full, theta, max_positions), _rope(local, local_theta, max_positions)


def _rope(parameters: Mapping[str, Any], default_theta: float, max_positions: int) -> RopeConfig:
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModelError("config.json: partial_rotary_factor is not supported; it must be 1")
    scaling: RopeScaling | None
    match kind:
        case "default":
            scaling = None
        case "linear":
            scaling = LinearScaling(_number(parameters, "factor"))
        case "llama3":
            scaling = Llama3Scaling(
                factor=_number(parameters, "factor"),
                low_freq_factor=_number(parameters, "low_freq_factor"),
                high_freq_factor=_number(parameters, "high_freq_factor"),
                original_max_position_embeddings=_positive_int(
                    parameters, "original_max_position_embeddings", max_positions
                ),
            )
        case _:
            raise UnsupportedModelError(
                f"config.json: rope type {kind!r} is not supported; supported: default, linear, llama3"
            )
    return RopeConfig(_number(parameters, "rope_theta", default_theta), scaling)


class _Experts(TypedDict, total=False):
    """The fields of a ModelConfig that a dense model leaves out."""

    num_experts: int
    num_experts_per_token: int
    moe_intermediate_size: int
    norm_topk_prob: bool
    sparse_layers: tuple[bool, ...]


def _experts(raw: Mapping[str, Any], architecture: Architecture, num_layers: int) -> _Experts:
    """Return the experts; transformers 5 writes Qwen3-MoE's `num_experts` as Mixtral's `num_local_experts`."""
    match architecture:
        case "MixtralForCausalLM":
            return {
                "num_experts": _positive_int(raw, "num_local_experts", 8),
                "num_experts_per_token": _positive_int(raw, "num_experts_per_tok", 2),
                "moe_intermediate_size": _positive_int(raw, "intermediate_size"),
                "norm_topk_prob": True,
                "sparse_layers": (True,) * num_layers,
            }
        case "Qwen3MoeForCausalLM":
            key = "num_local_experts" if "num_local_experts" in raw else "num_experts"
            step = _positive_int(raw, "decoder_sparse_step", 1)
            dense = _layer_indices(raw, "mlp_only_layers")
            return {
                "num_experts": _positive_int(raw, key, 128),
                "num_experts_per_token": _positive_int(raw, "num_experts_per_tok", 8),
                "moe_intermediate_size": _positive_int(raw, "moe_intermediate_size", 768),
                "norm_topk_prob": bool(raw.get("norm_topk_prob", False)),
                "sparse_layers": tuple(i not in dense and (i + 1) % step == 0 for i in range(num_layers)),
            }
        case _:
            return {}


def _layer_indices(raw: Mapping[str, Any], key: str) -> list[int]:
    value = raw.get(key) or []
    if not isinstance(value, list) or not all(isinstance(layer, int) for layer in value):
        raise UnsupportedModelError(f"config.json: {key} is {value!r}; it must be a list of layer numbers")
    return value


def _positive_int(raw: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = raw.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UnsupportedModelError(f"config.json: {key} is {value!r}; it must be a positive integer")
    return value


def _number(raw: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = raw.get(key)
    value = default if value is None else value
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise UnsupportedModelError(f"config.json: {key} is {value!r}; it must be a number")
    return float(value)
