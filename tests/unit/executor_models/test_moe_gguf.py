"""Mixtures of experts as GGUF files: the stacked tensors of today, the one tensor per expert of older Mixtral files."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as T
from safetensors.torch import load_file
from torch import Tensor

from ranks_kit import assert_ranks_make_up, fake_shards
from scalellm.services.executor.models import ModelRuntime
from scalellm.services.executor.models.quantization import Quantization
from scalellm.services.executor.models.shard import Shard
from scalellm.services.executor.weights import UnsupportedModelError, load_model, read_model_config

_EXPERT = re.compile(r"(.*experts)\.(\d+)\.(\w+)\.weight")
_SPLIT = {"w1": "ffn_gate", "w2": "ffn_down", "w3": "ffn_up"}


def convert(oracle: Any, directory: Path, *, kind: T = T.F32, split: bool = False, **extra: Any) -> None:
    """Write a transformers model as GGUF, under the names that the gguf package has for its tensors.

    The values of matrices are rounded to `kind`, in the oracle too.
    """
    config = oracle.config
    mixtral = config.model_type == "mixtral"
    arch = "llama" if mixtral else "qwen3moe"
    writer = gguf.GGUFWriter(directory / "model.gguf", arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_count(config.num_local_experts)
    if not mixtral:
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    for key, value in extra.items():
        getattr(writer, f"add_{key}")(value)

    with torch.no_grad():
        for parameter in oracle.parameters():
            if parameter.dim() > 1:
                rounded = gguf.dequantize(gguf.quantize(parameter.numpy(), kind), kind)
                parameter.copy_(torch.from_numpy(rounded))
    oracle.save_pretrained(directory / "hf")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA if mixtral else gguf.MODEL_ARCH.QWEN3MOE, 9)
    tensors: dict[str, list[np.ndarray]] = {}
    checkpoint = load_file(directory / "hf" / "model.safetensors")
    for name in sorted(checkpoint):  # experts 0 to 9 in order
        values = _interleaved(name, checkpoint[name], config.head_dim) if mixtral else checkpoint[name]
        match = _EXPERT.fullmatch(name)
        native = names.get_name(f"{match[1]}.{match[3]}.weight" if match else name, (".weight",))
        if match and split:
            native = f"{native.split('.ffn')[0]}.{_SPLIT[match[3]]}.{match[2]}.weight"
        tensors.setdefault(native, []).append(values.numpy())
    for native, parts in tensors.items():
        array = np.stack(parts) if "_exps" in native else parts[0]
        quantised = array.ndim > 1
        writer.add_tensor(
            native, gguf.quantize(array, kind) if quantised else array, raw_dtype=kind if quantised else None
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _interleaved(name: str, values: Tensor, head_dim: int) -> Tensor:
    """Reorder the rows of q and k as llama.cpp's converter does for its `llama` architecture."""
    if not re.search(r"[qk]_proj", name):
        return values
    return values.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2).contiguous()


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("mixtral", {}),
        ("mixtral", {"kind": T.Q8_0}),
        ("mixtral", {"split": True}),
        ("qwen3-moe", {"kind": T.Q4_0}),
    ],
)
@pytest.mark.parametrize("method", ["none", "keep"])
def test_logits(
    family: str,
    options: dict[str, Any],
    method: Any,
    hf_model: Callable[..., Any],
    paged: Callable[..., Any],
    tmp_path: Path,
) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2}
    if family == "mixtral":
        oracle = hf_model(family, **sizes, sliding_window=None)
    else:
        oracle = hf_model(family, **sizes, moe_intermediate_size=32, mlp_only_layers=[])
    convert(oracle, tmp_path, **options)
    model, config = load_model(tmp_path, ModelRuntime(quantization=Quantization(method)))
    assert config == read_model_config(tmp_path)
    tokens = torch.randint(211, (30,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = oracle(tokens[None]).logits[0]
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(paged(model, config).step({0: tokens.tolist()})[0], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("size", "experts"), [(2, 1), (2, 2), (4, 2)])
@pytest.mark.parametrize("method", ["none", "keep"])
def test_ranks_hold_the_experts_together(
    size: int, experts: int, method: Any, hf_model: Callable[..., Any], tmp_path: Path
) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 8, "num_hidden_layers": 1}
    convert(hf_model("mixtral", **sizes, num_local_experts=4, sliding_window=None), tmp_path, kind=T.Q8_0)

    def load(shard: Shard) -> Any:
        return load_model(tmp_path, ModelRuntime(quantization=Quantization(method), shard=shard))[0]

    ranks = [load(shard) for shard in fake_shards(size, experts)]
    assert assert_ranks_make_up(load(Shard()), ranks) >= 2 + 4 + (12 if experts < size else 0)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"expert_shared_count": 1}, "llama.expert_shared_count is set; shared experts are not supported"),
        ({"expert_gating_func": gguf.ExpertGatingFuncType.SIGMOID}, "llama.expert_gating_func is not softmax"),
        ({"expert_weights_scale": 2.5}, "llama.expert_weights_scale is not supported; it must be 1"),
    ],
)
def test_other_routing_is_refused(
    extra: dict[str, Any], message: str, hf_model: Callable[..., Any], tmp_path: Path
) -> None:
    convert(hf_model("mixtral", num_hidden_layers=1), tmp_path, **extra)
    with pytest.raises(UnsupportedModelError, match=message):
        read_model_config(tmp_path)
