"""Checkpoints of every quantised format against transformers running the weights that they stand for."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantised_checkpoints import Encoder, awq, fp8, gptq, int8, packed, write_checkpoint
from ranks_kit import assert_ranks_make_up, fake_shards
from scalellm.services.executor.models import ModelRuntime, Quantization
from scalellm.services.executor.models.shard import Shard
from scalellm.services.executor.weights import UnsupportedModelError, load_model, read_model_config, weight_bytes

GROUP = 16
TOKENS = torch.randint(211, (40,), generator=torch.Generator().manual_seed(5))
AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "GEMM", "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False}
AUTO_ROUND = {
    "quant_method": "auto-round",
    "bits": 4,
    "group_size": GROUP,
    "sym": True,
    "data_type": "int",
    "packing_format": "auto_round:auto_gptq",
    "extra_config": {"lm_head": {"bits": 16, "data_type": "float"}, r".*\.mlp\.gate$": {"bits": 16}},
}


def compressed(form: str, weights: dict[str, Any], inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"symmetric": True, **weights}, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def ints(bits: int, **more: Any) -> dict[str, Any]:
    return {"type": "int", "num_bits": bits, "strategy": "group", "group_size": GROUP, **more}


FLOAT8 = {"type": "float", "num_bits": 8}
PER_TOKEN = {**FLOAT8, "strategy": "token", "dynamic": True}
INT8_PER_TOKEN = {"type": "int", "num_bits": 8, "strategy": "token", "dynamic": True}
INT_FORMATS: dict[str, tuple[dict[str, Any], Encoder]] = {
    "awq": (AWQ, awq(GROUP)),
    "gptq": (GPTQ, gptq(4, GROUP, symmetric=True)),
    "gptq-mislabelled": (GPTQ, gptq(4, GROUP, symmetric=True, zero_offset=0)),  # as GPTQModel 5 writes them
    "gptq-8": (GPTQ | {"bits": 8}, gptq(8, GROUP, symmetric=True)),
    "gptq-zeros": (GPTQ | {"sym": False, "desc_act": True, "static_groups": True}, gptq(4, GROUP, symmetric=False)),
    "gptq-v2": (
        GPTQ | {"sym": False, "bits": 8, "checkpoint_format": "gptq_v2"},
        gptq(8, GROUP, symmetric=False, zero_offset=0),
    ),
    "gptq-order": (GPTQ | {"sym": False, "desc_act": True}, gptq(4, GROUP, symmetric=False, ordered=True)),
    "auto-round": (AUTO_ROUND, gptq(4, GROUP, symmetric=True)),
    "auto-round-awq": (AUTO_ROUND | {"packing_format": "auto_round:auto_awq", "sym": False}, awq(GROUP)),
    "gptq-order-8": (GPTQ | {"bits": 8, "desc_act": True}, gptq(8, GROUP, symmetric=True, ordered=True)),
    "gptq-rows": (GPTQ | {"group_size": -1, "desc_act": True}, gptq(4, None, symmetric=True)),
    "packed": (compressed("pack-quantized", ints(4)), packed(4, GROUP, symmetric=True)),
    "packed-8": (compressed("pack-quantized", ints(8)), packed(8, GROUP, symmetric=True)),
    "packed-zeros": (
        compressed("pack-quantized", ints(4, symmetric=False)),
        packed(4, GROUP, symmetric=False),
    ),
    "packed-rows": (
        compressed("pack-quantized", {"type": "int", "num_bits": 8, "strategy": "channel", "symmetric": False}),
        packed(8, None, symmetric=False),
    ),
    "packed-order": (
        compressed("pack-quantized", ints(4, actorder="group")),
        packed(4, GROUP, symmetric=True, ordered=True),
    ),
    "int8": (
        compressed("int-quantized", {"type": "int", "num_bits": 8, "strategy": "channel"}, INT8_PER_TOKEN),
        int8(),
    ),
}
INPUT_SCALE = 0.02
FP8_FORMATS: dict[str, tuple[dict[str, Any], Encoder]] = {
    "fp8": ({"quant_method": "fp8", "activation_scheme": "dynamic"}, fp8()),
    "fp8-static": ({"quant_method": "fp8", "activation_scheme": "static"}, fp8(input_scale=INPUT_SCALE)),
    "fp8-static-transformers": (
        {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None},
        fp8(input_scale=INPUT_SCALE, like_transformers=True),
    ),
    "modelopt-static": (
        {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"], "kv_cache_scheme": None},
        fp8(input_scale=INPUT_SCALE),
    ),
    "fp8-block": ({"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [GROUP, GROUP]}, fp8(block=GROUP)),
    "float-tensor": (
        compressed("float-quantized", {**FLOAT8, "strategy": "tensor"}, {**FLOAT8, "strategy": "tensor"}),
        fp8(input_scale=INPUT_SCALE),
    ),
    "float-channel": (compressed("float-quantized", {**FLOAT8, "strategy": "channel"}, PER_TOKEN), fp8(rows=True)),
}


def reference(oracle: Any) -> Tensor:
    with torch.inference_mode():
        return oracle(TOKENS[None]).logits[0]


@pytest.mark.parametrize("name", INT_FORMATS)
def test_integers(name: str, hf_model: Callable[..., Any], paged: Callable[..., Any], tmp_path: Path) -> None:
    config, encode = INT_FORMATS[name]
    oracle = hf_model("llama", num_hidden_layers=2, attention_bias=True)
    write_checkpoint(oracle, tmp_path, config, encode)
    model, model_config = load_model(tmp_path, ModelRuntime(), max_model_len=64)
    got = paged(model, model_config).step({0: TOKENS.tolist()})[0]
    torch.testing.assert_close(got, reference(oracle), atol=1e-4, rtol=0)
    assert weight_bytes(read_model_config(tmp_path), ModelRuntime(), max_model_len=64) == model.num_bytes()


def quantise_inputs(oracle: Any, scale: float | None, group: int | None) -> None:
    """Make the projections of a transformers model round their inputs to e4m3."""

    def rounded(module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = inputs[0].unflatten(-1, (-1, group or inputs[0].shape[-1]))
        s = x.abs().amax(-1, keepdim=True) / 448 if scale is None else torch.tensor(scale)
        return (((x / s).clamp(-448, 448).to(torch.float8_e4m3fn).float() * s).flatten(-2),)

    for name, module in oracle.named_modules():
        if name.endswith("_proj"):
            module.register_forward_pre_hook(rounded)


@pytest.mark.parametrize("name", FP8_FORMATS)
def test_fp8(name: str, hf_model: Callable[..., Any], paged: Callable[..., Any], tmp_path: Path) -> None:
    config, encode = FP8_FORMATS[name]
    oracle = hf_model("qwen2", num_hidden_layers=2)
    write_checkpoint(oracle, tmp_path, config, encode)
    full_precision = reference(oracle)
    static = "static" in name or name == "float-tensor"
    if static:  # of projections that read the same, the largest is taken
        file = tmp_path / "model.safetensors"
        tensors = load_file(file)
        smaller = {
            key: tensor / 2
            for key, tensor in tensors.items()
            if re.search(r"(q|up)_proj\.(input|activation)_scale$", key)
        }
        save_file(tensors | smaller, file)
    quantise_inputs(oracle, INPUT_SCALE if static else None, GROUP if "block" in name else None)
    expected = reference(oracle)
    model, model_config = load_model(tmp_path, ModelRuntime(), max_model_len=64)
    got = paged(model, model_config).step({0: TOKENS.tolist()})[0]
    # A value close to the middle of two codes may fall to either side, and then moves what follows a little.
    error = (got - expected).norm() / expected.norm()
    assert error < 0.1 * (full_precision - expected).norm() / expected.norm(), error
    assert weight_bytes(read_model_config(tmp_path), ModelRuntime(), max_model_len=64) == model.num_bytes()


@pytest.mark.parametrize("name", [*INT_FORMATS, *FP8_FORMATS])
def test_ranks_hold_the_model_together(name: str, hf_model: Callable[..., Any], tmp_path: Path) -> None:
    config, encode = (INT_FORMATS | FP8_FORMATS)[name]
    oracle = hf_model("llama", num_hidden_layers=1, head_dim=16, attention_bias=name in INT_FORMATS)
    write_checkpoint(oracle, tmp_path, config, encode)

    def load(shard: Shard) -> Any:
        return load_model(tmp_path, ModelRuntime(shard=shard), max_model_len=64)[0]

    if "-order" in name:
        message = (
            "tensor_parallel: model.layers.0.self_attn.o_proj has its inputs in activation order (desc_act, actorder)"
        )
        with pytest.raises(UnsupportedModelError, match=re.escape(message)):
            load(Shard(0, 2))
        return
    # Words, scales and perhaps zero points of seven projections, embedding and output projection.
    assert assert_ranks_make_up(load(Shard()), [load(shard) for shard in fake_shards(2)]) >= 2 + 7


def test_groups_are_not_divided(hf_model: Callable[..., Any], tmp_path: Path) -> None:
    config, encode = INT_FORMATS["awq"]
    write_checkpoint(hf_model("llama", num_hidden_layers=1), tmp_path, config, encode)
    with pytest.raises(UnsupportedModelError) as refused:
        load_model(tmp_path, ModelRuntime(shard=Shard(0, 2)))
    assert str(refused.value) == (
        "tensor_parallel: model.layers.0.self_attn.o_proj has 48 inputs, of which a rank would get 0 to 23; "
        "they can be divided at multiples of 16 only"
    )


def test_layers_that_are_not_quantised(hf_model: Callable[..., Any], paged: Callable[..., Any], tmp_path: Path) -> None:
    oracle = hf_model("llama", num_hidden_layers=2)
    config, encode = INT_FORMATS["packed"]
    write_checkpoint(oracle, tmp_path, config | {"ignore": ["lm_head", "re:.*self_attn.*"]}, encode, "self_attn")
    got = paged(*load_model(tmp_path, ModelRuntime())).step({0: TOKENS.tolist()})[0]
    torch.testing.assert_close(got, reference(oracle), atol=1e-4, rtol=0)


def test_layers_that_gptqmodel_was_told_to_leave(
    hf_model: Callable[..., Any], paged: Callable[..., Any], tmp_path: Path
) -> None:
    oracle = hf_model("llama", num_hidden_layers=2)
    config, encode = INT_FORMATS["gptq-order"]
    write_checkpoint(oracle, tmp_path, config | {"dynamic": {r"-:.*\.mlp\.": {}}}, encode, ".mlp.")
    got = paged(*load_model(tmp_path, ModelRuntime())).step({0: TOKENS.tolist()})[0]
    torch.testing.assert_close(got, reference(oracle), atol=1e-4, rtol=0)


@pytest.mark.parametrize("place", ["compression_config", "hf_quant_config.json"])
def test_where_the_configuration_may_be(hf_model: Callable[..., Any], tmp_path: Path, place: str) -> None:
    """llm-compressor called it compression_config in 2024, ModelOpt had a file of its own."""
    oracle = hf_model("llama", num_hidden_layers=1)
    config, encode = INT_FORMATS["packed"]
    if place == "compression_config":
        write_checkpoint(oracle, tmp_path, config | {"sparsity_config": {"format": "dense"}}, encode)
    else:
        _, encode = FP8_FORMATS["modelopt-static"]
        write_checkpoint(oracle, tmp_path, {}, encode, "self_attn")
        excluded = {"quant_algo": "FP8", "exclude_modules": ["lm_head", "model.layers.*.self_attn*"]}
        (tmp_path / place).write_text(json.dumps({"producer": {"name": "modelopt"}, "quantization": excluded}))
    file = tmp_path / "config.json"
    settings = json.loads(file.read_text())
    settings["compression_config"] = settings.pop("quantization_config")
    file.write_text(json.dumps(settings))
    model, _ = load_model(tmp_path, ModelRuntime())
    assert model.num_bytes() < weight_bytes(replace(read_model_config(tmp_path), stored_linears=None), ModelRuntime())


@pytest.fixture
def checkpoint(hf_model: Callable[..., Any], tmp_path: Path) -> Callable[[str], Path]:
    def write(name: str) -> Path:
        oracle = hf_model("llama", num_hidden_layers=1)
        write_checkpoint(oracle, tmp_path, *(INT_FORMATS | FP8_FORMATS)[name])
        return tmp_path

    return write


def refusal(path: Path, runtime: ModelRuntime | None = None) -> str:
    with pytest.raises(UnsupportedModelError) as caught:
        load_model(path, runtime or ModelRuntime())
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "suffix", "change", "message"),
    [
        ("gptq", "q_proj.g_idx", lambda t: t.flip(0), "q_proj.g_idx reorders the inputs; the configuration (desc_act"),
        ("gptq-order", "q_proj.g_idx", lambda t: t * 0, "q_proj.g_idx: its groups are not of 16 inputs each"),
        (
            "gptq-order",
            "v_proj.g_idx",
            lambda t: t.flip(0),
            "v_proj.g_idx differs from model.layers.0.self_attn.q_proj",
        ),
        ("gptq-order", "o_proj.g_idx", None, "tensors are missing, the first is model.layers.0.self_attn.o_proj.g_idx"),
        (
            "gptq",
            "down_proj.bias",
            lambda t: t + 1,
            "down_proj.bias is not zero; the configuration says that there is no",
        ),
        ("gptq", "k_proj.qzeros", lambda t: t + 1, "k_proj.qzeros: zero points other than 8, but sym is true"),
        ("gptq", "k_proj.scales", lambda t: t[1:], "k_proj.scales has shape [2, 16], the configuration asks for [3, 1"),
        ("awq", "v_proj.qweight", lambda t: t.float(), "v_proj.qweight has dtype F32; supported: I32"),
        ("packed", "o_proj.weight_shape", lambda t: t + 1, "weight_shape is [49, 49], the configuration asks for [48,"),
        ("fp8", "up_proj.weight_scale", lambda t: t.expand(2), "weight_scale has shape [2], the configuration asks"),
        ("fp8", "up_proj.weight", lambda t: t.float(), "up_proj.weight has dtype F32; supported: F8_E4M3"),
        ("fp8-static", "up_proj.input_scale", None, "1 of 26 tensors are missing, the first is model.layers.0.mlp.up_"),
    ],
)
def test_tensors_other_than_the_format_has(
    checkpoint: Callable[[str], Path], name: str, suffix: str, change: Callable[[Tensor], Tensor] | None, message: str
) -> None:
    file = checkpoint(name) / "model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith(suffix))
    tensor = tensors.pop(key)
    if change is not None:
        tensors[key] = change(tensor).contiguous()
    save_file(tensors, file)
    assert message in refusal(file.parent)


def test_surplus_tensors_of_a_format(checkpoint: Callable[[str], Path]) -> None:
    file = checkpoint("fp8") / "model.safetensors"
    save_file({**load_file(file), "model.layers.0.mlp.up_proj.input_scale": torch.ones(1)}, file)
    assert "1 tensors are not part of LlamaForCausalLM, the first is model.layers.0.mlp.up_proj.input_scale" in refusal(
        file.parent
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "fbgemm_fp8"}, "quant_method 'fbgemm_fp8' is not supported; supported: fp8, awq, gptq, comp"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt 'e5m2' is not supported; supported: e4m3"),
        ({"quant_method": "fp8", "weight_block_size": 128}, "weight_block_size is 128; it must be two positive integ"),
        ({"quant_method": "fp8", "weight_block_size": [32, 32]}, "(weight_block_size) do not divide its shape, [48, 4"),
        (AWQ | {"version": "gemv"}, "version 'gemv' is not supported; supported: gemm"),
        (AWQ | {"bits": 8}, "bits 8 is not supported; supported: 4"),
        (AWQ | {"zero_point": False}, "zero_point False is not supported; supported: True"),
        (AWQ | {"group_size": 0}, "group_size is 0; it must be a positive integer, or -1"),
        (AWQ | {"group_size": 32}, "is not a multiple of 8 numbers per word and of the group_size, 32"),
        (
            AWQ | {"modules_to_not_convert": ["k_proj"]},
            "k_proj is not quantised and model.layers.0.self_attn.q_proj is",
        ),
        (GPTQ | {"bits": 3}, "bits 3 is not supported; supported: 4, 8"),
        (GPTQ | {"lm_head": True}, "lm_head True is not supported; supported: False"),
        (GPTQ | {"dynamic": {"-:.*": {}, "+:.*": {}}}, "dynamic is supported for rules '-:<regex>' only"),
        (
            AUTO_ROUND | {"extra_config": {"lm_head": {"bits": 8}}},
            "extra_config is supported for layers of 16 bits only",
        ),
        (
            AUTO_ROUND | {"packing_format": "auto_round:exllamav2"},
            "packing_format 'auto_round:exllamav2' is not supported",
        ),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quant_algo 'NVFP4' is not supported; supported: FP8"),
        (
            compressed("nvfp4-pack-quantized", ints(4)),
            "format 'nvfp4-pack-quantized' is not supported; supported: float-quantized, n",
        ),
        (compressed("int-quantized", ints(8)), "strategy 'group' is not supported; supported: channel"),
        (
            compressed("pack-quantized", ints(4)) | {"sparsity_config": {"format": "sparse-24-bitmask"}},
            "sparsity_config is not supported unless dense",
        ),
        (
            compressed("pack-quantized", ints(4)) | {"transform_config": {"config_groups": {}}},
            "transform_config is not",
        ),
        (
            compressed("pack-quantized", ints(4, strategy="tensor")),
            "strategy 'tensor' is not supported; supported: gro",
        ),
        (
            compressed("float-quantized", {**FLOAT8, "strategy": "group"}, PER_TOKEN),
            "strategy 'group' is not supported",
        ),
        (
            compressed("float-quantized", {**FLOAT8, "strategy": "tensor"}),
            "type None is not supported; supported: floa",
        ),
        (compressed("pack-quantized", ints(4), PER_TOKEN), "input_activations"),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "config_groups must have exactly one group"),
        ("int4", "quantization_config is 'int4'; it must be an object"),
    ],
)
def test_formats_that_are_not_read(checkpoint: Callable[[str], Path], config: Any, message: str) -> None:
    file = checkpoint("awq") / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": config}))
    assert message in refusal(file.parent)


def test_a_quantised_checkpoint_is_not_quantised_again(checkpoint: Callable[[str], Path]) -> None:
    message = refusal(checkpoint("awq"), ModelRuntime(quantization=Quantization("int8")))
    assert "quantization int8: the checkpoint is quantised already; leave it out" in message
