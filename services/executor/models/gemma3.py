"""The decoder layer of Gemma 3 (arXiv 2503.19786): the Llama layer with a norm after each block as well."""

from collections.abc import Iterator

from torch import Tensor

from scalellm.services.executor.model_config.config import ModelConfig
from scalellm.services.executor.models.layers import Attention, GatedMLP, RMSNorm
from scalellm.services.executor.models.linear import ToAdd
from scalellm.services.executor.models.runtime import ModelRuntime
from scalellm.services.executor.models.weight_slot import WeightSlot


class Gemma3DecoderLayer:
    """Attention and MLP, each between two norms, added to the residual stream after the second."""

    def __init__(self, config: ModelConfig, layer: int, cos_sin_cache: Tensor, runtime: ModelRuntime) -> None:
        self.self_attn = Attention(config, layer, cos_sin_cache, runtime)
        self.mlp = GatedMLP(config, layer, runtime)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config, runtime)
        self.pre_feedforward_layernorm = RMSNorm(config.hidden_size, config, runtime)
        self.post_feedforward_layernorm = RMSNorm(config.hidden_size, config, runtime)

    def mix(self, attended: Tensor, residual: Tensor) -> ToAdd:
        """Apply what comes after the attention `[T, Hq * D]`: its output projection and the MLP.

        Returns what the next norm adds to `residual [T, H]`, which is updated in place.
        """
        attended = self.post_attention_layernorm(self.self_attn.project(attended))
        x = self.pre_feedforward_layernorm(attended, residual, into=self.mlp.gate_up_proj)
        return self.post_feedforward_layernorm(self.mlp(x))

    def weight_slots(self, prefix: str) -> Iterator[WeightSlot]:
        """Yield the slots of this layer."""
        yield from self.self_attn.weight_slots()
        yield self.post_attention_layernorm.weight_slot(f"{prefix}.post_attention_layernorm")
        yield self.pre_feedforward_layernorm.weight_slot(f"{prefix}.pre_feedforward_layernorm")
        yield self.post_feedforward_layernorm.weight_slot(f"{prefix}.post_feedforward_layernorm")
        yield from self.mlp.weight_slots()
