"""Small random GGUF files: transformers reads the same file and must compute the same logits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as T
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from ranks_kit import assert_ranks_make_up, fake_shards
from scalellm.services.common.tokenizer_digest import tokenizer_sha256
from scalellm.services.executor.model_config.errors import UnsupportedModelError
from scalellm.services.executor.model_config.rope import (
    FrequencyFactors,
    LinearScaling,
    RopeConfig,
    YarnScaling,
    yarn_attention_factor,
)
from scalellm.services.executor.models import ModelRuntime, Quantization
from scalellm.services.executor.models.shard import Shard
from scalellm.services.executor.weights import load_model, read_model_config, weight_bytes

CPU = torch.device("cpu")
VOCAB, HIDDEN, INNER, LAYERS, HEADS, KV_HEADS = 200, 64, 96, 3, 4, 2


def write_gguf(
    path: Path,
    arch: str,
    *,
    head_dim: int = 16,
    tied: bool = True,
    kinds: tuple[T, ...] = (T.F32,),
    tensors_per_file: int = 0,
    **extra: Any,
) -> None:
    """Write a random model; matrices take the quantisation types of `kinds` in turn."""
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=tensors_per_file)
    writer.add_block_count(LAYERS)
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(20000.0)
    writer.add_vocab_size(VOCAB)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_token_list([f"token {i}" for i in range(VOCAB)])
    if arch == "gemma3":
        writer.add_sliding_window(24)
    for key, value in extra.items():
        method = getattr(writer, f"add_{key}")
        method(*value) if isinstance(value, tuple) else method(value)

    rng = np.random.default_rng(5)
    count = 0

    def matrix(name: str, rows: int, columns: int) -> None:
        nonlocal count
        kind = kinds[count % len(kinds)]
        count += 1
        values = rng.normal(0, 0.15, (rows, columns)).astype(np.float32)
        writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)

    def vector(name: str, size: int, mean: float) -> None:
        writer.add_tensor(name, rng.normal(mean, 0.2, size).astype(np.float32))

    matrix("token_embd.weight", VOCAB, HIDDEN)
    for layer in range(LAYERS):
        block = f"blk.{layer}"
        vector(f"{block}.attn_norm.weight", HIDDEN, 1)
        matrix(f"{block}.attn_q.weight", HEADS * head_dim, HIDDEN)
        matrix(f"{block}.attn_k.weight", KV_HEADS * head_dim, HIDDEN)
        matrix(f"{block}.attn_v.weight", KV_HEADS * head_dim, HIDDEN)
        matrix(f"{block}.attn_output.weight", HIDDEN, HEADS * head_dim)
        if arch == "qwen2":
            vector(f"{block}.attn_q.bias", HEADS * head_dim, 0)
            vector(f"{block}.attn_k.bias", KV_HEADS * head_dim, 0)
            vector(f"{block}.attn_v.bias", KV_HEADS * head_dim, 0)
        if arch in ("qwen3", "gemma3"):
            vector(f"{block}.attn_q_norm.weight", head_dim, 1)
            vector(f"{block}.attn_k_norm.weight", head_dim, 1)
        vector(f"{block}.ffn_norm.weight", HIDDEN, 1)
        if arch == "gemma3":
            vector(f"{block}.post_attention_norm.weight", HIDDEN, 1)
            vector(f"{block}.post_ffw_norm.weight", HIDDEN, 1)
        matrix(f"{block}.ffn_gate.weight", INNER, HIDDEN)
        matrix(f"{block}.ffn_up.weight", INNER, HIDDEN)
        matrix(f"{block}.ffn_down.weight", HIDDEN, INNER)
    vector("output_norm.weight", HIDDEN, 1)
    if not tied:
        matrix("output.weight", VOCAB, HIDDEN)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_with_transformers(path: Path) -> Any:
    """Load a GGUF file through transformers' own conversion (`from_pretrained` would want accelerate for it)."""
    config = AutoConfig.for_model(**load_gguf_checkpoint(str(path))["config"])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    result = model.load_state_dict(tensors, strict=False)
    assert set(result.missing_keys) <= {"lm_head.weight"}  # tied
    assert not result.unexpected_keys
    return model


BASIC = (T.F32, T.F16, T.BF16)
QUANTISED = (T.Q8_0, T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1)


@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("llama", {"kinds": BASIC}),
        ("llama", {"kinds": QUANTISED, "tied": False}),
        ("llama", {"head_dim": 32}),
        ("qwen2", {"kinds": QUANTISED}),
        # transformers does not read these two sizes from the file; its defaults are those of the published models.
        ("qwen3", {"head_dim": 128, "kinds": QUANTISED}),
        ("gemma3", {"head_dim": 256, "kinds": QUANTISED}),
    ],
)
@pytest.mark.parametrize("method", ["none", "keep"])
def test_logits(method: Any, arch: str, options: dict[str, Any], paged: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, arch, **options)
    oracle = read_with_transformers(path)
    runtime = ModelRuntime(quantization=Quantization(method))
    model, config = load_model(tmp_path, runtime)
    assert config == read_model_config(path)
    assert model.num_bytes() == weight_bytes(config, runtime)
    is_packed = method == "keep" and options.get("kinds") is QUANTISED
    assert (model.num_bytes() < weight_bytes(config, ModelRuntime())) == is_packed
    tokens = torch.randint(VOCAB, (60,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = oracle(tokens[None]).logits[0]
    logits = paged(model, config).step({0: tokens.tolist()})[0]
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", ["none", "keep"])
@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_ranks_hold_the_model_together(method: Any, arch: str, tmp_path: Path) -> None:
    """The files of llama have the rows of queries and keys in an order of their own."""
    write_gguf(tmp_path / "model.gguf", arch, kinds=(T.Q8_0, T.Q4_0, T.F16, T.Q5_1), tied=False)

    def load(shard: Shard) -> Any:
        return load_model(tmp_path, ModelRuntime(quantization=Quantization(method), shard=shard))[0]

    whole = load(Shard())
    assert assert_ranks_make_up(whole, [load(shard) for shard in fake_shards(2)]) >= 2 + 7 * LAYERS


def test_blocks_are_not_divided(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", "llama", kinds=(T.Q8_0,), head_dim=8)
    with pytest.raises(UnsupportedModelError) as refused:
        load_model(tmp_path, ModelRuntime(shard=Shard(1, 2)))
    assert str(refused.value) == (
        "tensor_parallel: model.layers.0.self_attn.o_proj has 32 inputs, of which a rank would get 16 to 31; "
        "they can be divided at multiples of 32 only"
    )


def test_rope_scaling(tmp_path: Path) -> None:
    path = tmp_path / "linear.gguf"
    write_gguf(path, "llama", rope_scaling_type=gguf.RopeScalingType.LINEAR, rope_scaling_factor=4.0)
    assert read_model_config(path).rope == RopeConfig(20000.0, LinearScaling(4.0))

    path = tmp_path / "scaled-gemma.gguf"
    write_gguf(path, "gemma3", rope_scaling_type=gguf.RopeScalingType.LINEAR, rope_scaling_factor=8.0)
    config = read_model_config(path)
    assert config.rope == RopeConfig(20000.0, LinearScaling(8.0))
    assert config.local_rope == RopeConfig(10000.0)

    path = tmp_path / "factors.gguf"
    factors = np.linspace(1, 8, 8, dtype=np.float32)
    write_gguf(path, "llama", tensor=("rope_freqs.weight", factors))
    assert read_model_config(path).rope == RopeConfig(20000.0, FrequencyFactors(tuple(factors.tolist())))
    load_model(path, ModelRuntime())


def test_stop_tokens(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, "llama", eot_token_id=7, eom_token_id=2)
    assert read_model_config(path).eos_token_ids == (2, 7)


@pytest.mark.parametrize(
    ("pattern", "expected"), [(2, (True, False, True)), ([False, True, True], (False, True, True))]
)
def test_sliding_window_pattern(pattern: Any, expected: tuple[bool, ...], tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, "gemma3", sliding_window_pattern=pattern)
    assert read_model_config(path).sliding_layers == expected


@pytest.mark.parametrize("name", ["model", "tiny-Q8_0"])
def test_a_split_model_is_the_same_one(name: str, paged: Callable[..., Any], tmp_path: Path) -> None:
    write_gguf(tmp_path / "whole.gguf", "llama", kinds=QUANTISED)
    folder = tmp_path / "parts"
    folder.mkdir()
    write_gguf(folder / f"{name}.gguf", "llama", kinds=QUANTISED, tensors_per_file=10)
    parts = sorted(folder.iterdir())
    assert [part.name for part in parts] == [f"{name}-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    whole, whole_config = load_model(tmp_path / "whole.gguf", ModelRuntime())
    prompt = [(7 * i + 3) % VOCAB for i in range(20)]
    expected = paged(whole, whole_config).step({0: prompt})[0]
    for place in (folder, parts[0]):
        split, config = load_model(place, ModelRuntime())
        assert config == whole_config
        assert tokenizer_sha256(place) == tokenizer_sha256(tmp_path / "whole.gguf")
        assert torch.equal(paged(split, config).step({0: prompt})[0], expected)
    with pytest.raises(UnsupportedModelError, match=f"part 2 of a split model; give its first file, {parts[0].name}"):
        load_model(parts[1], ModelRuntime())
    parts[1].rename(folder / "kept")
    with pytest.raises(UnsupportedModelError, match=f"1 of 3 parts are missing: {parts[1].name}"):
        load_model(parts[0], ModelRuntime())
    parts[2].rename(parts[1])
    (folder / "kept").rename(parts[2])
    with pytest.raises(UnsupportedModelError, match=r"split.no is 2; by its name it is 1"):
        load_model(parts[0], ModelRuntime())


def test_yarn_is_what_transformers_computes(tmp_path: Path) -> None:
    """transformers does not read the keys of yarn; a config.json that says the same is compared with it elsewhere."""
    path = tmp_path / "model.gguf"
    extra = {
        "rope_scaling_type": gguf.RopeScalingType.YARN,
        "rope_scaling_factor": 4.0,
        "rope_scaling_orig_ctx_len": 64,
    }
    write_gguf(path, "qwen2", **extra)
    rope = read_model_config(path).rope
    assert rope == RopeConfig(20000.0, YarnScaling(4.0, 64, yarn_attention_factor(4.0)))
    write_gguf(path, "qwen2", **extra, rope_scaling_yarn_log_mul=0.1)
    with pytest.raises(UnsupportedModelError, match="qwen2.rope.scaling.yarn_log_multiplier is 0.1.*; it must be 0"):
        read_model_config(path)
