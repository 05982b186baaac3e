"""Checkpoints with quantised experts, against transformers with the weights that they stand for."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from ranks_kit import assert_ranks_make_up, fake_shards
from scalellm.services.executor.models import ModelRuntime
from scalellm.services.executor.weights import UnsupportedModelError, load_model

EXPERT = re.compile(r".*\.experts\.\d+\.(\w+)\.weight")
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [8, 24]}
GPTQ = {"quant_method": "gptq", "bits": 8, "group_size": 16, "sym": True, "desc_act": False}
RANKS = {"gptq": 2, "gptq-rows": 2, "fp8": 1}  # blocks of fp8 are as wide as the experts
GPTQ_ROWS = GPTQ | {"group_size": -1, "desc_act": True}


def fp8_blocks(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Return the stored tensors of a weight by what follows its name, and the weight that they stand for."""
    blocks = weight.unflatten(0, (-1, 8)).unflatten(2, (-1, 24))
    scale = blocks.abs().amax((1, 3), keepdim=True) / 448
    codes = (blocks / scale).to(torch.float8_e4m3fn)
    stored = {"weight": codes.flatten(2).flatten(0, 1), "weight_scale_inv": scale[:, 0, :, 0].contiguous()}
    return stored, (codes.float() * scale).flatten(2).flatten(0, 1)


def gptq(weight: Tensor, group_size: int = 16) -> tuple[dict[str, Tensor], Tensor]:
    """Return what `fp8_blocks` does, for GPTQ; with a bias of zeros, as AutoGPTQ has it."""
    groups = weight.unflatten(1, (-1, group_size))
    scale = groups.abs().amax(2, keepdim=True) / 127
    numbers = (groups / scale).round()
    bytes_ = (numbers + 128).to(torch.uint8).flatten(1)
    stored = {
        "qweight": bytes_.view(torch.int32).T.contiguous(),  # four numbers of a row to a word, lowest bits first
        "qzeros": torch.full((groups.shape[1], weight.shape[0] // 4), 0x7F7F7F7F, dtype=torch.int32),
        "scales": scale.squeeze(2).T.contiguous(),
        "bias": torch.zeros(weight.shape[0]),
    }
    return stored, (numbers * scale).flatten(1)


def gptq_rows(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Return what `gptq` does, with one group per row: of different sizes for the two products."""
    stored, meant = gptq(weight, weight.shape[1])
    return stored | {"g_idx": torch.zeros(weight.shape[1], dtype=torch.int32)}, meant


@pytest.mark.parametrize(("family", "form"), [("mixtral", "gptq"), ("mixtral", "gptq-rows"), ("qwen3-moe", "fp8")])
def test_logits(
    family: str, form: str, hf_model: Callable[..., Any], paged: Callable[..., Any], tmp_path: Path
) -> None:
    """Only the experts are quantised: elsewhere, inputs would be as well, and transformers does that differently."""
    settings, quantise = {"fp8": (FP8, fp8_blocks), "gptq": (GPTQ, gptq), "gptq-rows": (GPTQ_ROWS, gptq_rows)}[form]
    oracle = hf_model(family)
    oracle.save_pretrained(tmp_path)
    meant = load_file(tmp_path / "model.safetensors")
    tensors: dict[str, Tensor] = {}
    for name, tensor in meant.items():
        if EXPERT.fullmatch(name):
            stored, meant[name] = quantise(tensor)
            tensors |= {name.removesuffix("weight") + suffix: value for suffix, value in stored.items()}
        else:
            tensors[name] = tensor
    save_file(meant, tmp_path / "model.safetensors", {"format": "pt"})
    oracle = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", dtype=torch.float32).eval()
    save_file(tensors, tmp_path / "model.safetensors")
    file = tmp_path / "config.json"
    dense = [f"model.layers.{layer}.{name}" for layer in range(4) for name in ("self_attn", "mlp.gate")]
    dense += [f"model.layers.1.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")]
    quantization = {**settings, "modules_to_not_convert": dense}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": quantization}))

    tokens = torch.randint(211, (20,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = oracle(tokens[None]).logits[0]
    model, model_config = load_model(tmp_path, ModelRuntime())
    ours = paged(model, model_config)
    torch.testing.assert_close(ours.step({0: tokens.tolist()})[0], expected, atol=1e-4, rtol=0)
    ranks = [load_model(tmp_path, ModelRuntime(shard=shard))[0] for shard in fake_shards(RANKS[form])]
    assert_ranks_make_up(model, ranks)


def test_experts_cannot_reorder_their_inputs(hf_model: Callable[..., Any], tmp_path: Path) -> None:
    hf_model("mixtral").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    quantization = {**GPTQ, "desc_act": True, "modules_to_not_convert": ["self_attn"]}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": quantization}))
    with pytest.raises(UnsupportedModelError, match=r"activation order \(desc_act\) is not supported for experts"):
        load_model(tmp_path, ModelRuntime())
