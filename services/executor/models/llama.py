"""The decoder layer of the Llama family: Llama, Mistral, Mixtral and the Qwens differ in configuration only."""

from collections.abc import Iterator

from torch import Tensor

from scalellm.services.executor.model_config.config import ModelConfig
from scalellm.services.executor.models.layers import Attention, GatedMLP, RMSNorm
from scalellm.services.executor.models.linear import ToAdd
from scalellm.services.executor.models.moe import MoeMLP
from scalellm.services.executor.models.runtime import ModelRuntime
from scalellm.services.executor.models.weight_slot import WeightSlot


class LlamaDecoderLayer:
    """Pre-norm attention and MLP, or experts, each added to the residual stream (arXiv 2302.13971)."""

    def __init__(self, config: ModelConfig, layer: int, cos_sin_cache: Tensor, runtime: ModelRuntime) -> None:
        self.self_attn = Attention(config, layer, cos_sin_cache, runtime)
        mlp_class = MoeMLP if config.is_sparse_layer(layer) else GatedMLP
        self.mlp = mlp_class(config, layer, runtime)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config, runtime)

    def mix(self, attended: Tensor, residual: Tensor) -> ToAdd:
        """Apply what comes after the attention `[T, Hq * D]`: its output projection and the MLP.

        Returns what the next norm adds to `residual [T, H]`, which is updated in place.
        """
        x = self.self_attn.project(attended, residual=residual)
        if isinstance(self.mlp, GatedMLP):
            normed = self.post_attention_layernorm(x, residual, into=self.mlp.gate_up_proj)
            return self.mlp(normed, residual=residual)
        return self.mlp(self.post_attention_layernorm(x, residual))

    def weight_slots(self, prefix: str) -> Iterator[WeightSlot]:
        """Yield the slots of this layer."""
        yield from self.self_attn.weight_slots()
        yield self.post_attention_layernorm.weight_slot(f"{prefix}.post_attention_layernorm")
        yield from self.mlp.weight_slots()
