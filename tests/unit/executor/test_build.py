"""Settings that cannot work are refused in one sentence that says what would, before anything is loaded."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from runner_kit import MODEL as TINY
from scalellm.kernels.cpu.library import default_build_dir, load_library
from scalellm.services.common.lifecycle import StartError
from scalellm.services.executor.build import build_engine
from scalellm.services.executor.config import ExecutorSettings
from scalellm.services.executor.models import ModelRuntime, UnsupportedModelError
from scalellm.services.executor.models.linear import CheckpointFormat
from scalellm.services.executor.models.linear.stored_dense import StoredDense
from scalellm.services.executor.models.linear.stored_gguf import StoredGguf
from scalellm.services.executor.placement import choose_placement
from scalellm.services.executor.runner import FakeCudaDevice
from scalellm.services.executor.weight_form import other_forms, weight_form


def refusal(model: Path, **settings: object) -> str:
    with pytest.raises(StartError) as refused:
        build_engine(ExecutorSettings(model=str(model), **settings), lambda line: None)  # type: ignore[arg-type]
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(model_dir: Callable[[str], Path]) -> None:
    message = refusal(model_dir("smollm2-135m-instruct"), device="cuda")
    assert message.startswith("--device cuda: torch ")
    assert "--device cpu" in message


def test_heads_that_cannot_be_divided_among_ranks(model_dir: Callable[[str], Path]) -> None:
    """The refusal comes before any of the other ranks is told to load its share."""
    message = refusal(model_dir("smollm2-135m-instruct"), device="cpu", tensor_parallel=2)
    assert message == "tensor_parallel 2: num_attention_heads 9 is not a multiple of it"
    message = refusal(model_dir("smollm2-135m-instruct"), device="cpu", tensor_parallel=3, expert_parallel=3)
    assert message == "expert_parallel 3: the model has no experts"


GGUF = StoredGguf({"model.layers.0.self_attn.q_proj.weight": "Q4_1", "model.norm.weight": "F32"})
HALVES = StoredDense({"model.layers.0.self_attn.q_proj.weight": torch.bfloat16, "model.norm.weight": torch.float32})


@pytest.mark.parametrize(
    ("settings", "stored", "quantization", "cache_dtype"),
    [
        ({}, GGUF, "keep", torch.int8),
        ({}, HALVES, "keep", torch.bfloat16),
        ({"dtype": "bfloat16"}, HALVES, "keep", torch.bfloat16),
        ({}, None, "keep", torch.float32),
        ({"quantization": "none"}, GGUF, "none", torch.float32),
        ({"kernels": "all=torch"}, GGUF, "none", torch.float32),
        ({"kernels": "w8a16_gemm=torch"}, HALVES, "none", torch.float32),
        ({"dtype": "float16"}, GGUF, "none", torch.float16),
    ],
)
def test_what_auto_stands_for_on_a_cpu_with_a_compiler(
    settings: dict[str, Any], stored: CheckpointFormat | None, quantization: str, cache_dtype: torch.dtype
) -> None:
    if load_library(default_build_dir()) is None:
        pytest.skip("there is no compiler")
    placement = choose_placement(ExecutorSettings(device="cpu", **settings), replace(TINY, stored_linears=stored))
    assert (placement.quantization, placement.kv_cache_dtype) == (quantization, cache_dtype)


def test_the_form_of_weights_is_reported_beside_another(model_dir: Callable[[str], Path]) -> None:
    lines: list[str] = []
    settings = ExecutorSettings(model=str(model_dir("smollm2-135m-instruct")), device="cpu", num_blocks=64)
    loaded = build_engine(settings, lines.append)
    info = loaded.info
    loaded_library = load_library(settings.home / "kernels")
    if loaded_library is None:
        pytest.skip("there is no compiler")
    assert loaded.engine.stats().speculation == "on", "a step was recorded, which computes rows as if each were alone"
    assert (info.quantization, info.dtype, info.kv_cache_dtype) == ("Q4_1", "float32", "int8")
    ours, other = info.weights, info.other_weights
    assert (ours.quantization, ours.type) == ("keep", "Q4_1")
    assert (other.quantization, other.type) == ("none", "float32")
    assert other.bytes > 4 * ours.bytes > 4 * 135e6 / 2  # of 135 million numbers
    assert (info.instructions, dict(info.unused_instructions)) == (loaded_library.level, {})
    assert re.search(r": Q4_1, \d+ MiB \(--quantization none: float32, \d+ MiB\)", lines[0])


def test_a_form_that_fits_is_named(model_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scalellm.services.executor.runner.CpuDevice.free_memory", lambda self: 200 << 20)
    message = refusal(model_dir("smollm2-135m-instruct"), device="cpu", quantization="none")
    assert "float32, 515 MiB, and 200 MiB of memory are free" in message
    assert "--quantization keep (Q4_1, " in message
    monkeypatch.setattr("scalellm.services.executor.runner.CpuDevice.free_memory", lambda self: 1 << 20)
    assert "or take a smaller model" in refusal(model_dir("smollm2-135m-instruct"), device="cpu", quantization="none")


def test_a_form_that_a_model_cannot_have_is_not_told_of() -> None:
    """36 inputs are groups of 4 numbers, of which 8 bits make words and 4 bits do not."""
    runtime = ModelRuntime()
    config = replace(TINY, hidden_size=36)
    with pytest.raises(UnsupportedModelError, match="quantization int4"):
        weight_form("int4", config, runtime, 16)
    form = weight_form("none", config, runtime, 16)
    assert [other.quantization for other in other_forms(form, config, runtime, 16)] == ["int8"]


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [
        ({"quantization": "none"}, torch.float32),
        ({"quantization": "int8"}, torch.int8),
        ({"quantization": "int8", "kv_cache_dtype": "float16"}, torch.float16),
        ({"quantization": "int8", "kv_cache_dtype": "float32"}, torch.float32),
        ({"quantization": "keep", "kv_cache_dtype": "fp8"}, torch.float8_e4m3fn),
        ({"dtype": "bfloat16"}, torch.bfloat16),
    ],
)
def test_type_of_keys_and_values_on_a_cpu(settings: dict[str, str], dtype: torch.dtype) -> None:
    placement = choose_placement(ExecutorSettings(device="cpu", **settings), TINY)  # type: ignore[arg-type]
    assert placement.kv_cache_dtype == dtype


@pytest.mark.parametrize(
    ("kernels", "words"),
    [
        ({"smaple": "torch"}, "there is no op 'smaple'"),
        ({"sample": "triton"}, "sample cannot run on triton: it needs compute capability 8.0"),
    ],
)
def test_kernels_that_cannot_be_had(model_dir: Callable[[str], Path], kernels: dict[str, str], words: str) -> None:
    message = refusal(model_dir("smollm2-135m-instruct"), device="cpu", kernels=kernels)
    assert message.startswith("--kernels: ")
    assert words in message


def test_graphs_of_ops_that_wait_for_the_device(
    model_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_cpu = choose_placement(ExecutorSettings(device="cpu", quantization="none"), TINY)
    on_gpu = replace(on_cpu, device=FakeCudaDevice(), dtype=torch.bfloat16)
    monkeypatch.setattr("scalellm.services.executor.placement.choose_placement", lambda settings, model: on_gpu)
    message = refusal(model_dir("smollm2-135m-instruct"), kernels={"paged_attention_decode": "torch"})
    assert message.startswith("paged_attention_decode: ")
    assert "--enforce-eager" in message
