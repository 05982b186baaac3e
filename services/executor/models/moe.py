"""The expert layer of Mixtral (arXiv 2401.04088) and Qwen3-MoE (arXiv 2505.09388), in place of the gated MLP."""

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor

from services.executor.models.config import ModelConfig
from services.executor.models.runtime import ModelRuntime
from services.executor.models.weight_slot import WeightSlot

_MIXTRAL_PARTS = ("w1", "w3", "w2")
_PARTS = ("gate_proj", "up_proj", "down_proj")


class MoeMLP:
    """The weighted sum of the gated MLPs, SwiGLU each, of the experts that a router chooses for each token.

    The router is never quantised: its scores decide which experts run, and it is small.
    """

    def __init__(self, config: ModelConfig, layer: int, runtime: ModelRuntime) -> None:
        hidden, inner, experts = config.hidden_size, config.moe_intermediate_size, config.num_experts
        mixtral = config.architecture == "MixtralForCausalLM"
        self._prefix = f"model.layers.{layer}.{'block_sparse_moe' if mixtral else 'mlp'}"
        self._ops = runtime.ops
        self._top_k = config.num_experts_per_token
        self._renormalize = config.norm_topk_prob
        self._part_names = _MIXTRAL_PARTS if mixtral else _PARTS
        self.gate = runtime.empty(experts, hidden)
        self.w13 = runtime.empty(experts, 2 * inner, hidden)
        self.w2 = runtime.empty(experts, hidden, inner)

    def __call__(self, x: Tensor) -> Tensor:
        """`[T, H]` -> `[T, H]`."""
        weights, ids = self._ops.topk_softmax(F.linear(x, self.gate), self._top_k, self._renormalize)
        return self._ops.fused_moe(x, self.w13, self.w2, weights, ids)

    def weight_slots(self) -> Iterator[WeightSlot]:
        """Yield the slots of the router and of every expert's three matrices."""
        yield WeightSlot(f"{self._prefix}.gate.weight", self.gate)
        for expert, (w13, w2) in enumerate(zip(self.w13, self.w2, strict=True)):
            parts = (*w13.chunk(2), w2)
            for name, weight in zip(self._part_names, parts, strict=True):
                yield WeightSlot(f"{self._prefix}.experts.{expert}.{name}.weight", weight)
