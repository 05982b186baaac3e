"""Experts quantised on load, against the same experts in full precision."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from scalellm.services.executor.model_config.hf_config import config_from_hf
from scalellm.services.executor.models import ModelConfig, ModelRuntime, UnsupportedModelError
from scalellm.services.executor.models.linear import Fp8Weight
from scalellm.services.executor.models.moe import MoeMLP
from scalellm.services.executor.models.quantization import Quantization

CPU = torch.device("cpu")
CONFIG = config_from_hf(
    {
        "architectures": ["Qwen3MoeForCausalLM"],
        "vocab_size": 10,
        "hidden_size": 128,
        "intermediate_size": 64,
        "moe_intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    }
)
X = torch.randn(16, 128, generator=torch.Generator().manual_seed(4))


def output(config: ModelConfig, runtime: ModelRuntime) -> Tensor:
    mlp = MoeMLP(config, 0, runtime)
    generator = torch.Generator().manual_seed(0)
    for slot in mlp.weight_slots():
        slot.load(torch.randn(slot.shape, generator=generator) * 0.2, CPU)
    return mlp(X)


@pytest.mark.parametrize(
    ("quantization", "tolerance"),
    [
        (Quantization("fp8"), 0.05),
        (Quantization("fp8", granularity="tensor"), 0.05),
        (Quantization("int8"), 0.01),
        (Quantization("int4"), 0.2),  # in groups of 32, which divides both widths
    ],
)
def test_experts_quantised_on_load(quantization: Quantization, tolerance: float) -> None:
    expected = output(CONFIG, ModelRuntime())
    error = (output(CONFIG, ModelRuntime(quantization=quantization)) - expected).norm() / expected.norm()
    assert 0 < error < tolerance


class SomeExperts:
    """A checkpoint that has quantised some of the experts only."""

    is_choice = False

    def __init__(self, quantised: Callable[[str], bool]) -> None:
        self._quantised = quantised

    def build(self, parts: dict[str, int], in_features: int, runtime: ModelRuntime) -> Any:
        if not any(map(self._quantised, parts)):
            return None
        return Fp8Weight(sum(parts.values()), in_features, runtime), []


@pytest.mark.parametrize(
    ("quantised", "message"),
    [
        (
            lambda name: "experts.0." not in name,
            "mlp.experts.1.gate_proj is not quantised as model.layers.0.mlp.experts.0.",
        ),
        (
            lambda name: "experts.4." not in name,
            "mlp.experts.4.gate_proj is not quantised as model.layers.0.mlp.experts.0.",
        ),
        (
            lambda name: "down" not in name,
            "full precision for down projections; an op takes experts of one form only",
        ),
    ],
)
def test_experts_quantised_in_part_are_refused(quantised: Callable[[str], bool], message: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        MoeMLP(replace(CONFIG, stored_linears=SomeExperts(quantised)), 0, ModelRuntime())
    assert message in str(caught.value)
