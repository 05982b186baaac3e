"""Settings that cannot work are refused in one sentence that says what would, before anything is loaded."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from services.common.lifecycle import StartError
from services.executor.build import build_engine
from services.executor.config import ExecutorSettings
from services.executor.placement import choose_placement
from services.executor.runner import FakeCudaDevice


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


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [
        ({}, torch.float32),
        ({"quantization": "int8"}, torch.int8),
        ({"quantization": "int8", "kv_cache_dtype": "float16"}, torch.float16),
        ({"quantization": "int8", "kv_cache_dtype": "float32"}, torch.float32),
        ({"quantization": "keep", "kv_cache_dtype": "fp8"}, torch.float8_e4m3fn),
        ({"dtype": "bfloat16"}, torch.bfloat16),
    ],
)
def test_type_of_keys_and_values_on_a_cpu(settings: dict[str, str], dtype: torch.dtype) -> None:
    assert choose_placement(ExecutorSettings(device="cpu", **settings)).kv_cache_dtype == dtype  # type: ignore[arg-type]


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
    on_gpu = replace(choose_placement(ExecutorSettings(device="cpu")), device=FakeCudaDevice(), dtype=torch.bfloat16)
    monkeypatch.setattr("services.executor.placement.choose_placement", lambda settings: on_gpu)
    message = refusal(model_dir("smollm2-135m-instruct"), kernels={"paged_attention_decode": "torch"})
    assert message.startswith("paged_attention_decode: ")
    assert "--enforce-eager" in message
