"""Settings that cannot work are refused in one sentence that says what would, before anything is loaded."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from services.common.lifecycle import StartError
from services.executor.build import build_engine
from services.executor.config import ExecutorSettings


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
