"""ModelConfig: the shape and the arithmetic of a decoder model, whatever file it came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from scalellm.services.executor.model_config.errors import UnsupportedModelError
from scalellm.services.executor.model_config.rope import FrequencyFactors, RopeConfig

if TYPE_CHECKING:
    from scalellm.services.executor.models.linear import CheckpointFormat

Architecture = Literal[
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "MixtralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "Gemma3ForCausalLM",
]
Activation = Literal["silu", "gelu_tanh"]

_MAX_EXPERTS = 1 << 16


@dataclass(frozen=True)
class ModelConfig:
    """The configuration of one decoder-only model.

    `attention_scale` multiplies the query-key products; `embedding_scale` the token embeddings. A softcap of 0 means
    none. Layer `i` is a sliding-window layer when `sliding_layers[i]`: it sees the last `sliding_window` positions,
    its own included, and uses `local_rope`; every other layer sees everything and uses `rope`.
    `eos_token_ids` are all the ids that end an answer (`scalellm.services.common.end_tokens`).
    Where `sparse_layers[i]`, the MLP of layer `i` is a mixture of `num_experts` experts of `moe_intermediate_size`, of
    which a token takes the `num_experts_per_token` most probable; `norm_topk_prob` makes their weights add up to 1. A
    dense model has no such layers.
    `stored_linears` is how the checkpoint holds its linear layers if it has quantised them.
    """

    architecture: Architecture
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    local_rope: RopeConfig
    sliding_window: int | None
    sliding_layers: tuple[bool, ...]
    attention_scale: float
    qk_norm: bool
    qkv_bias: bool
    o_bias: bool
    activation: Activation
    tie_word_embeddings: bool
    embedding_scale: float
    attention_softcap: float
    final_softcap: float
    eos_token_ids: tuple[int, ...] = ()
    num_experts: int = 0
    num_experts_per_token: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = False
    sparse_layers: tuple[bool, ...] = ()
    stored_linears: CheckpointFormat | None = None

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise UnsupportedModelError(
                f"num_attention_heads ({self.num_heads}) is not a multiple of num_key_value_heads ({self.num_kv_heads})"
            )
        if self.head_dim % 2:
            raise UnsupportedModelError(f"head_dim ({self.head_dim}) is odd; rotary embeddings need an even one")
        if len(self.sliding_layers) != self.num_layers:
            raise UnsupportedModelError(
                f"layer_types names {len(self.sliding_layers)} layers, num_hidden_layers is {self.num_layers}"
            )
        if any(self.sliding_layers) and self.sliding_window is None:
            raise UnsupportedModelError("layer_types has sliding_attention layers but sliding_window is not set")
        if self.num_experts_per_token > self.num_experts:
            raise UnsupportedModelError(
                f"num_experts_per_tok ({self.num_experts_per_token}) is more than num_experts ({self.num_experts})"
            )
        if self.num_experts * self.num_layers > _MAX_EXPERTS:
            raise UnsupportedModelError(
                f"the model says it has {self.num_experts} experts in {self.num_layers} layers; "
                f"at most {_MAX_EXPERTS} in all are supported"
            )
        if any(self.sparse_layers) and self.activation != "silu":
            raise UnsupportedModelError(
                f"experts with activation {self.activation!r} are not supported; supported: silu"
            )
        for rope in (self.rope, self.local_rope):
            if isinstance(rope.scaling, FrequencyFactors) and len(rope.scaling.factors) != self.head_dim // 2:
                raise UnsupportedModelError(
                    f"rope_freqs.weight has {len(rope.scaling.factors)} values, head_dim / 2 is {self.head_dim // 2}"
                )

    @property
    def is_gemma(self) -> bool:
        """True if norms multiply by 1 + w and every block ends in a norm."""
        return self.architecture == "Gemma3ForCausalLM"

    def is_sparse_layer(self, layer: int) -> bool:
        """Return whether the MLP of this layer is a mixture of experts."""
        return bool(self.sparse_layers) and self.sparse_layers[layer]

    def layer_window(self, layer: int) -> int:
        """Return how many positions, its own included, a token of this layer sees; 0 means all of them."""
        return (self.sliding_window or 0) if self.sliding_layers[layer] else 0

    def layer_rope(self, layer: int) -> RopeConfig:
        """Return the rotary settings of this layer."""
        return self.local_rope if self.sliding_layers[layer] else self.rope
