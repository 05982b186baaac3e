"""A KV cache of 8 bits: close to one of float32, and, of e4m3 numbers, scaled as the checkpoint says."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from scalellm.kernels import Capability, select_ops
from scalellm.services.executor.models import ModelRuntime, allocate_kv_caches
from scalellm.services.executor.models.context import kv_bytes_per_token
from scalellm.services.executor.weights import UnsupportedModelError, load_model

E4M3 = torch.float8_e4m3fn
TOKENS = torch.randint(211, (40,), generator=torch.Generator().manual_seed(5)).tolist()


def logits(ours: Any) -> Tensor:
    """Logits of a prefill, of another that reads what the first one wrote, and of decode steps."""
    chunks = [TOKENS[:20], TOKENS[20:36], *([token] for token in TOKENS[36:])]
    return torch.cat([ours.step({0: chunk})[0] for chunk in chunks])


def with_scales(directory: Path, **scales: float) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    tensors |= {
        f"model.layers.{i}.self_attn.{k.replace('__', '.')}": torch.tensor([v])
        for i in range(4)
        for k, v in scales.items()
    }
    save_file(tensors, file)


@pytest.mark.parametrize(("kv_dtype", "error"), [(E4M3, 0.1), (torch.int8, 0.02)])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_close_to_full_precision(
    family: str,
    kv_dtype: torch.dtype,
    error: float,
    hf_model: Callable[..., Any],
    paged: Callable[..., Any],
    tmp_path: Path,
) -> None:
    hf_model(family).save_pretrained(tmp_path)
    model, config = load_model(tmp_path, ModelRuntime())
    expected = logits(paged(model, config))
    got = logits(paged(model, config, kv_dtype=kv_dtype))
    assert 0 < (got - expected).norm() / expected.norm() < error


@pytest.mark.parametrize("kernels", ["torch", "cpp"])
def test_memory_is_what_a_token_is_said_to_take(kernels: str, hf_model: Callable[..., Any], tmp_path: Path) -> None:
    hf_model("llama").save_pretrained(tmp_path)
    config = load_model(tmp_path, ModelRuntime())[1]
    ops = select_ops(Capability.of(torch.device("cpu")), dtype=torch.float32, overrides={"all": kernels})
    for dtype in (torch.float32, torch.float16, E4M3, torch.int8):
        caches = allocate_kv_caches(config, 3, 16, dtype=dtype, device=torch.device("cpu"), ops=ops)
        taken = sum(part.numel() * part.element_size() for cache in caches for part in cache)
        assert taken == 3 * 16 * kv_bytes_per_token(config, dtype)


@pytest.mark.parametrize(
    "names", [("k_scale", "v_scale"), ("k_proj__k_scale", "v_proj__v_scale"), ("attn__k_scale", "attn__v_scale")]
)
def test_scales(
    names: tuple[str, str], hf_model: Callable[..., Any], paged: Callable[..., Any], tmp_path: Path
) -> None:
    oracle = hf_model("llama")
    oracle.save_pretrained(tmp_path)
    model, config = load_model(tmp_path, ModelRuntime())
    expected, unscaled = logits(paged(model, config)), logits(paged(model, config, kv_dtype=E4M3))

    # Values are clamped to next to nothing, as if there were none; a cache of floats has no use for scales.
    with_scales(tmp_path, **{names[0]: 1.0, names[1]: 1e-9})
    model, config = load_model(tmp_path, ModelRuntime())
    torch.testing.assert_close(logits(paged(model, config)), expected, atol=0, rtol=0)
    without_values = logits(paged(model, config, kv_dtype=E4M3))
    with torch.no_grad():
        for layer in oracle.model.layers:
            layer.self_attn.v_proj.weight.zero_()
        blind = oracle(torch.tensor([TOKENS])).logits[0]
    torch.testing.assert_close(without_values, blind, atol=1e-3, rtol=0)

    # Powers of two in the range of the format only move exponents.
    with_scales(tmp_path, **{names[0]: 0.25, names[1]: 0.125})
    model, config = load_model(tmp_path, ModelRuntime())
    torch.testing.assert_close(logits(paged(model, config, kv_dtype=E4M3)), unscaled, atol=0.02, rtol=0)


def test_one_scale_for_both(hf_model: Callable[..., Any], paged: Callable[..., Any], tmp_path: Path) -> None:
    hf_model("llama").save_pretrained(tmp_path)
    with_scales(tmp_path, k_scale=0.25, v_scale=0.25)
    expected = logits(paged(*load_model(tmp_path, ModelRuntime()), kv_dtype=E4M3))
    hf_model("llama").save_pretrained(tmp_path)
    with_scales(tmp_path, kv_scale=0.25)
    torch.testing.assert_close(
        logits(paged(*load_model(tmp_path, ModelRuntime()), kv_dtype=E4M3)), expected, atol=0, rtol=0
    )


def test_scales_that_cannot_be(hf_model: Callable[..., Any], tmp_path: Path) -> None:
    hf_model("llama").save_pretrained(tmp_path)
    with_scales(tmp_path, k_scale=0.0)
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.self_attn\.k_scale is 0\.0; it must be positive"):
        load_model(tmp_path, ModelRuntime())
