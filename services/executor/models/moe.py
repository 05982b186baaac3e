"""The expert layer of Mixtral (arXiv 2401.04088) and Qwen3-MoE (arXiv 2505.09388), in place of the gated MLP."""

from collections.abc import Iterator

from torch import Tensor

from scalellm.services.executor.model_config.config import ModelConfig
from scalellm.services.executor.models.experts import Experts
from scalellm.services.executor.models.linear import DenseWeight
from scalellm.services.executor.models.runtime import ModelRuntime
from scalellm.services.executor.models.weight_slot import WeightSlot, finish_with


class MoeMLP:
    """The weighted sum of the gated MLPs, SwiGLU each, of the experts that a router chooses for each token.

    The router is never quantised: its scores decide which experts run, and it is small.
    """

    def __init__(self, config: ModelConfig, layer: int, runtime: ModelRuntime) -> None:
        is_mixtral = config.architecture == "MixtralForCausalLM"
        prefix = f"model.layers.{layer}.{'block_sparse_moe' if is_mixtral else 'mlp'}"
        part_names = ("w1", "w3", "w2") if is_mixtral else ("gate_proj", "up_proj", "down_proj")
        self._topk_softmax = runtime.ops.topk_softmax
        self._top_k = config.num_experts_per_token
        self._renormalize = config.norm_topk_prob
        self._gate = DenseWeight(config.num_experts, config.hidden_size, runtime)
        self._gate_slot = WeightSlot(f"{prefix}.gate.weight", self._gate.weight)
        finish_with(self._gate.finish, [self._gate_slot])
        self._experts = Experts(f"{prefix}.experts", part_names, config, runtime)

    def __call__(self, x: Tensor) -> Tensor:
        """`[T, H]` -> `[T, H]`."""
        weights, ids = self._topk_softmax(self._gate.product(x, None), self._top_k, self._renormalize)
        return self._experts(x, weights, ids)

    def weight_slots(self) -> Iterator[WeightSlot]:
        """Yield the slots of the router and of every expert's three matrices."""
        yield self._gate_slot
        yield from self._experts.weight_slots()
