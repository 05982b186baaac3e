"""The decoder layer of the Llama family: Llama, Mistral, Mixtral and the Qwens differ in configuration only."""

from collections.abc import Iterator

from torch import Tensor

from services.executor.models.config import ModelConfig
from services.executor.models.context import ForwardContext, KVCache
from services.executor.models.layers import Attention, GatedMLP, RMSNorm, WeightSlot
from services.executor.models.moe import MoeMLP
from services.executor.models.runtime import ModelRuntime


class LlamaDecoderLayer:
    """Pre-norm attention and MLP, or experts, each added to the residual stream (arXiv 2302.13971)."""

    def __init__(self, config: ModelConfig, layer: int, cos_sin_cache: Tensor, runtime: ModelRuntime) -> None:
        self.self_attn = Attention(config, layer, cos_sin_cache, runtime)
        self.mlp = MoeMLP(config, runtime) if config.is_sparse_layer(layer) else GatedMLP(config, runtime)
        self._mlp_name = "block_sparse_moe" if config.architecture == "MixtralForCausalLM" else "mlp"
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config, runtime)

    def __call__(self, x: Tensor, residual: Tensor, ctx: ForwardContext, kv: KVCache) -> Tensor:
        """Return what the next norm adds to `residual`; `x [T, H]` is normed already, `residual` updated in place."""
        x = self.post_attention_layernorm(self.self_attn(x, ctx, kv), residual)
        return self.mlp(x)

    def weight_slots(self, prefix: str) -> Iterator[WeightSlot]:
        """Yield the slots of this layer."""
        yield from self.self_attn.weight_slots(f"{prefix}.self_attn")
        yield self.post_attention_layernorm.weight_slot(f"{prefix}.post_attention_layernorm")
        yield from self.mlp.weight_slots(f"{prefix}.{self._mlp_name}")
