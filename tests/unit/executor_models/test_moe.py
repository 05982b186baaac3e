"""Mixtures of experts against transformers: how many experts a token takes, ties, and which layers have them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig

from scalellm.services.executor.model_config.hf_config import config_from_hf
from scalellm.services.executor.models import ModelRuntime
from scalellm.services.executor.models.moe import MoeMLP
from scalellm.services.executor.weights import UnsupportedModelError, load_model, read_model_config

TOKENS = torch.randint(211, (24,), generator=torch.Generator().manual_seed(3))


def assert_same_logits(oracle: Any, directory: Path, paged: Callable[..., Any]) -> None:
    """Compare a prefill of most tokens and decode steps for the others."""
    oracle.save_pretrained(directory)
    ours = paged(*load_model(directory, ModelRuntime()))
    with torch.inference_mode():
        expected = oracle(TOKENS[None]).logits[0]
    first, *rest = TOKENS[:-3].tolist(), *TOKENS[-3:].tolist()
    got = [ours.step({0: first})[0], *(ours.step({0: [token]})[0] for token in rest)]
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(torch.cat(got), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe"])
def test_number_of_choices(
    family: str, top_k: int, hf_model: Callable[..., Any], paged: Callable[..., Any], tmp_path: Path
) -> None:
    experts = "num_local_experts" if family == "mixtral" else "num_experts"
    oracle = hf_model(family, num_experts_per_tok=top_k, num_hidden_layers=2, **{experts: 4})
    assert_same_logits(oracle, tmp_path, paged)


@pytest.mark.parametrize(
    "options",
    [
        {"norm_topk_prob": False},
        {"mlp_only_layers": [], "decoder_sparse_step": 2},
        {"mlp_only_layers": [0, 3], "attention_bias": True, "tie_word_embeddings": True},
        {"use_sliding_window": True, "sliding_window": 9},
    ],
)
def test_settings_of_qwen3_moe(
    options: dict[str, Any], hf_model: Callable[..., Any], paged: Callable[..., Any], tmp_path: Path
) -> None:
    assert_same_logits(hf_model("qwen3-moe", **options), tmp_path, paged)


def test_experts_that_tie(hf_model: Callable[..., Any], paged: Callable[..., Any], tmp_path: Path) -> None:
    """Experts 0 and 1 are alike, so that it does not matter which of the two transformers takes."""
    oracle = hf_model("mixtral")
    with torch.no_grad():
        for layer in oracle.model.layers:
            for tensor in (layer.mlp.gate.weight, layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
                tensor[1] = tensor[0]
    assert_same_logits(oracle, tmp_path, paged)


def test_of_equal_experts_the_first_are_taken(hf_model: Callable[..., Any], tmp_path: Path) -> None:
    hf_model("mixtral", num_experts_per_tok=3).save_pretrained(tmp_path)
    mlp = MoeMLP(read_model_config(tmp_path), 0, ModelRuntime())
    generator = torch.Generator().manual_seed(1)
    weights = {slot.name.removeprefix("model.layers.0.block_sparse_moe."): slot.dest for slot in mlp.weight_slots()}
    for tensor in weights.values():
        tensor.normal_(generator=generator)
    weights["gate.weight"].zero_()
    x = torch.randn(6, 48, generator=generator)

    def expert(number: int) -> Tensor:
        w1, w2, w3 = (weights[f"experts.{number}.w{i}.weight"] for i in (1, 2, 3))
        return (F.silu(x @ w1.T) * (x @ w3.T)) @ w2.T

    expected = (expert(0) + expert(1) + expert(2)) / 3
    torch.testing.assert_close(mlp(x), expected, atol=1e-4, rtol=1e-4)


MIXTRAL_8X7B: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
QWEN3_30B_A3B: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def test_published_configurations() -> None:
    mixtral = config_from_hf(MIXTRAL_8X7B)
    assert (mixtral.num_experts, mixtral.num_experts_per_token, mixtral.moe_intermediate_size) == (8, 2, 14336)
    assert mixtral.norm_topk_prob
    assert mixtral.sparse_layers == (True,) * 32
    assert not mixtral.qk_norm
    qwen = config_from_hf(QWEN3_30B_A3B)
    assert (qwen.num_experts, qwen.num_experts_per_token, qwen.moe_intermediate_size) == (128, 8, 768)
    assert qwen.norm_topk_prob
    assert qwen.sparse_layers == (True,) * 48
    assert qwen.qk_norm


@pytest.mark.parametrize(
    "raw",
    [
        MIXTRAL_8X7B,
        {**MIXTRAL_8X7B, "sliding_window": 4096},
        QWEN3_30B_A3B,
        {**QWEN3_30B_A3B, "use_sliding_window": True, "sliding_window": 64, "mlp_only_layers": [3, 5]},
        {**MIXTRAL_8X7B, "num_local_experts": None, "rope_theta": None, "rms_norm_eps": None},
    ],
)
def test_both_styles_mean_the_same(raw: dict[str, Any], tmp_path: Path) -> None:
    raw = {key: value for key, value in raw.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path)
    rewritten = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in rewritten
    assert "num_experts" not in rewritten
    assert config_from_hf(rewritten) == config_from_hf(raw)


@pytest.mark.parametrize(
    ("raw", "change", "message"),
    [
        (MIXTRAL_8X7B, {"hidden_act": "gelu_pytorch_tanh"}, "experts with activation 'gelu_tanh' are not supported"),
        (MIXTRAL_8X7B, {"num_experts_per_tok": 9}, "num_experts_per_tok (9) is more than num_experts (8)"),
        (MIXTRAL_8X7B, {"num_local_experts": 0}, "num_local_experts is 0; it must be a positive integer"),
        (QWEN3_30B_A3B, {"num_experts": "many"}, "num_experts is 'many'; it must be a positive integer"),
        (QWEN3_30B_A3B, {"moe_intermediate_size": -1}, "moe_intermediate_size is -1; it must be a positive integer"),
        (QWEN3_30B_A3B, {"decoder_sparse_step": 0}, "decoder_sparse_step is 0; it must be a positive integer"),
        (QWEN3_30B_A3B, {"mlp_only_layers": "0"}, "mlp_only_layers is '0'; it must be a list of int"),
    ],
)
def test_refused_settings(raw: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        config_from_hf(raw | change)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_local_experts": 6}, "mlp.gate.weight has shape [7, 48], the configuration asks for [6, 48]"),
        ({"num_local_experts": 8}, "3 of 47 tensors are missing, the first is model.layers.0.mlp.experts.7.gate_proj"),
        ({"mlp_only_layers": []}, "22 of 63 tensors are missing, the first is model.layers.1.mlp.gate.weight"),
        ({"moe_intermediate_size": 16}, "mlp.experts.0.gate_proj.weight has shape [24, 48], the configuration"),
    ],
)
def test_experts_other_than_the_configuration_says(
    change: dict[str, Any], message: str, hf_model: Callable[..., Any], tmp_path: Path
) -> None:
    hf_model("qwen3-moe", num_hidden_layers=2).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UnsupportedModelError) as caught:
        load_model(tmp_path, ModelRuntime())
    assert message in str(caught.value)
