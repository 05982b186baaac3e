"""A model that cannot be served is refused with one sentence, before weights are allocated."""

import json
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from scalellm.services.executor.models import ModelRuntime
from scalellm.services.executor.weights import UnsupportedModelError, load_model, read_model_config

CPU = torch.device("cpu")


def refusal(path: Path) -> str:
    with pytest.raises(UnsupportedModelError) as caught:
        load_model(path, ModelRuntime())
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def checkpoint(hf_model: Callable[..., Any], tmp_path: Path) -> Path:
    hf_model("llama").save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["FalconForCausalLM"]}, "architectures ['FalconForCausalLM'] is not supported; supported"),
        ({"architectures": None}, "architectures [] is not supported"),
        (
            {"quantization_config": {"quant_method": "bitsandbytes"}},
            "quantization_config.quant_method 'bitsandbytes' is not supported; supported: fp8, awq, gptq, compressed",
        ),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 4.0}}, "rope type 'longrope' is not supported; supp"),
        ({"rope_parameters": {"rope_type": "yarn", "truncate": 1}}, "truncate is 1; it must be true or false"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "factor is None; it must be a number"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor is None; it must be a number"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_act": "relu"}, "hidden_act 'relu' is not supported; supported: silu"),
        ({"mlp_bias": True}, "mlp_bias is True; supported: False"),
        ({"hidden_size": None}, "hidden_size is None; it must be a positive integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; it must be a positive integer"),
        ({"num_attention_heads": "six"}, "num_attention_heads is 'six'; it must be a positive integer"),
        ({"num_key_value_heads": 4}, "num_attention_heads (6) is not a multiple of num_key_value_heads (4)"),
        ({"head_dim": 7}, "head_dim (7) is odd"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small'; it must be a number"),
        ({"intermediate_size": 64}, "mlp.gate_proj.weight has shape [80, 48], the configuration asks for [64, 48]"),
        ({"num_hidden_layers": 5}, "9 of 48 tensors are missing, the first is model.layers.4.input_layernorm.weight"),
        ({"num_hidden_layers": 3}, "9 tensors are not part of LlamaForCausalLM, the first is model.layers.3."),
        ({"attention_bias": True}, "16 of 55 tensors are missing, the first is model.layers.0.self_attn.q_proj.bias"),
    ],
)
def test_config(checkpoint: Path, change: dict[str, Any], message: str) -> None:
    file = checkpoint / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert message in refusal(checkpoint)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_types": ["full_attention", "chunked_attention"] * 2}, "layer_types has chunked_attention; supported"),
        ({"layer_types": ["full_attention"] * 3}, "layer_types names 3 layers, num_hidden_layers is 4"),
        ({"sliding_window": None}, "layer_types has sliding_attention layers but sliding_window is not set"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention is True; supported: False"),
    ],
)
def test_gemma_config(hf_model: Callable[..., Any], tmp_path: Path, change: dict[str, Any], message: str) -> None:
    hf_model("gemma3").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert message in refusal(tmp_path)


def test_paths(tmp_path: Path) -> None:
    assert "does not exist; a model is a directory or a .gguf file" in refusal(tmp_path / "nothing")
    assert "holds neither a .gguf file nor a config.json with safetensors" in refusal(tmp_path)
    (tmp_path / "model.bin").write_bytes(b"")
    assert "a model file must be a .gguf file" in refusal(tmp_path / "model.bin")
    (tmp_path / "a.gguf").write_bytes(b"")
    (tmp_path / "b.gguf").write_bytes(b"")
    assert "holds 2 .gguf files; give the path of one, or name it model.gguf" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "not readable JSON" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    assert "a JSON object is expected" in refusal(tmp_path)


def test_safetensors_files(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)

    save_file({**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}, file)
    load_model(checkpoint, ModelRuntime())  # old checkpoints have it; it is recomputed

    save_file({**tensors, "model.layers.0.self_attn.q_proj.bias": torch.zeros(48)}, file)
    assert "1 tensors are not part of LlamaForCausalLM" in refusal(checkpoint)

    save_file({name: tensor for name, tensor in tensors.items() if "norm" not in name}, file)
    assert "9 of 39 tensors are missing, the first is model.layers.0.input_layernorm.weight" in refusal(checkpoint)

    save_file({**tensors, "model.norm.weight": torch.zeros(48).to(torch.float8_e4m3fn)}, file)
    assert "model.norm.weight has dtype F8_E4M3; supported: F64, F32, F16, BF16" in refusal(checkpoint)

    save_file(tensors, file)
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    assert "not a complete safetensors file" in refusal(checkpoint)
    file.write_bytes(b"")
    assert "not a complete safetensors file" in refusal(checkpoint)
    file.unlink()
    assert "model.safetensors is missing" in refusal(checkpoint)


def test_shards(hf_model: Callable[..., Any], tmp_path: Path) -> None:
    hf_model("llama").save_pretrained(tmp_path, max_shard_size="60KB")
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name, shard = next(iter(content["weight_map"].items()))

    (tmp_path / shard).rename(tmp_path / "elsewhere")
    assert f"{shard} is missing" in refusal(tmp_path)
    (tmp_path / "elsewhere").rename(tmp_path / shard)

    other = next(file for file in content["weight_map"].values() if file != shard)
    index.write_text(json.dumps({"weight_map": content["weight_map"] | {name: other}}))
    assert f"lacks {name}, which model.safetensors.index.json says it has" in refusal(tmp_path)

    index.write_text(json.dumps({"weight_map": content["weight_map"] | {name: f"../{shard}"}}))
    assert "must be a file name in the same directory" in refusal(tmp_path)

    index.write_text(json.dumps({"metadata": {}}))
    assert "not a safetensors index" in refusal(tmp_path)


def write_gguf(path: Path, *, arch: str = "llama", drop: str = "", kind: Any = None, **values: Any) -> None:
    """Write the least that reads as a model of one layer, without the metadata key or tensor `drop`."""
    writer = gguf.GGUFWriter(path, arch)
    numbers = {
        "block_count": 1,
        "context_length": 64,
        "embedding_length": 32,
        "feed_forward_length": 32,
        "attention.head_count": 2,
        **values,
    }
    for key, value in numbers.items():
        if key != drop and isinstance(value, str):
            writer.add_string(f"{arch}.{key}", value)
        elif key != drop:
            writer.add_uint32(key if "." in key and key.startswith("split") else f"{arch}.{key}", value)
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", 1e-6)
    writer.add_token_list(["a", "b"])
    matrices = ["token_embd", *(f"blk.0.{m}" for m in ("attn_q", "attn_k", "attn_v", "attn_output"))]
    matrices += [f"blk.0.{m}" for m in ("ffn_gate", "ffn_up", "ffn_down")]
    for name in (f"{m}.weight" for m in matrices):
        if name == drop:
            continue
        if kind is not None and name != "token_embd.weight":
            block, size = gguf.GGML_QUANT_SIZES[kind]
            writer.add_tensor(name, np.zeros((32, max(1, 32 // block) * size), np.uint8), raw_dtype=kind)
        else:
            writer.add_tensor(name, np.zeros((32, 32), np.float32))
    for name in ("output_norm.weight", "blk.0.attn_norm.weight", "blk.0.ffn_norm.weight"):
        if name != drop:
            writer.add_tensor(name, np.zeros(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"arch": "mamba"},
            "general.architecture 'mamba' is not supported; supported: llama, qwen2, qwen3, qwen3moe, ",
        ),
        ({"expert_count": 8}, "llama.expert_used_count is None; it must be a positive integer"),
        ({"drop": "embedding_length"}, "llama.embedding_length is None; it must be a positive integer"),
        ({"attention.head_count": 33}, "llama.attention.key_length is None; it must be a positive integer"),
        ({"block_count": 1 << 30}, "GGUF: llama.block_count is 1073741824; at most 1024 is supported"),
        ({"drop": "context_length"}, "llama.context_length is None"),
        ({"attention.value_length": 8}, "llama.attention.value_length differs from key_length (16)"),
        ({"rope.dimension_count": 8}, "llama.rope.dimension_count must equal the head dimension (16)"),
        ({"rope.scaling.type": "longrope"}, "llama.rope.scaling.type 'longrope' is not supported; supported: none, "),
        ({"rope.scaling.type": "yarn"}, "llama.rope.scaling.factor is None; it must be a number"),
        ({"split.count": 3}, "split.count says that it is one of 3 parts, but its name says otherwise"),
        ({"drop": "token_embd.weight"}, "the tensor token_embd.weight is missing"),
        ({"drop": "blk.0.ffn_norm.weight"}, "1 of 11 tensors are missing"),
        ({"feed_forward_length": 64}, "blk.0.ffn_gate.weight has shape [32, 32], the configuration asks for [64, 32]"),
        ({"kind": gguf.GGMLQuantizationType.I8}, "has type I8, which the gguf package cannot dequantise"),
    ],
)
def test_gguf(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, **options)
    assert message in refusal(path)


def test_unknown_tensor_type(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path)
    content = path.read_bytes()
    name = b"token_embd.weight"
    at = content.index(name) + len(name) + 4 + 2 * 8
    path.write_bytes(content[:at] + struct.pack("<I", 255) + content[at + 4 :])
    assert "token_embd.weight has the unknown tensor type 255" in refusal(path)


def test_what_is_not_gguf(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    for content in (b"", b"GGUF", b"GGML" + bytes(100), b"GGUF" + struct.pack("<IQQ", 1, 0, 0)):
        path.write_bytes(content)
        assert "not a readable GGUF file" in refusal(path)


def test_cut_off_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path)
    load_model(path, ModelRuntime())
    content = path.read_bytes()
    for length in [*range(0, 1500, 7), *range(1500, len(content), 1009)]:
        path.write_bytes(content[:length])
        refusal(path)


@settings(max_examples=200)
@given(data=st.data())
def test_damage_is_refused_or_harmless(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "model.gguf"
    if not path.exists():
        write_gguf(path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, 1500))] = data.draw(st.integers(0, 255))
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(content)
    with suppress(UnsupportedModelError):
        read_model_config(damaged)
