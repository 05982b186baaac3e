"""The form of a model's weights: the meaning of `--quantization auto`, and the alternatives to a choice."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch

from scalellm.kernels.cpu.library import load_library
from scalellm.services.executor.config import ExecutorSettings
from scalellm.services.executor.models import ModelConfig, ModelRuntime, Quantization, UnsupportedModelError
from scalellm.services.executor.models.linear import DenseWeight
from scalellm.services.executor.models.linear.checkpoint import kept
from scalellm.services.executor.models.quantization import Method
from scalellm.services.executor.models.runtime import dtype_name
from scalellm.services.executor.weights import weight_bytes

Choice = Literal["none", "keep", "fp8", "fp8-tensor", "int8", "int4"]
_CPP_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class WeightForm:
    """A value of `--quantization`, the type that it gives a model's weights, and their size in bytes.

    `type` is that of most weights of linear layers: a GGUF type such as Q4_1, a dtype such as bfloat16, int8, ...
    """

    quantization: Choice
    type: str
    num_bytes: int

    def __str__(self) -> str:
        """Return type and size."""
        return f"{self.type}, {self.num_bytes / 2**20:.0f} MiB"


def choose_quantization(settings: ExecutorSettings, dtype: torch.dtype, *, on_gpu: bool) -> Choice:
    """Return the setting, or the choice that `auto` stands for.

    That is `keep` on a CPU with C++ forms, because stored forms are smaller than float32 and so are read faster;
    elsewhere it is `none`.
    """
    if settings.quantization != "auto":
        return settings.quantization
    is_cpp = settings.kernels.get("w8a16_gemm", settings.kernels.get("all", "cpp")) == "cpp"
    if on_gpu or not is_cpp or dtype not in _CPP_DTYPES or load_library(settings.home / "kernels") is None:
        return "none"
    return "keep"


def _method(choice: Choice) -> Method:
    return "fp8" if choice == "fp8-tensor" else choice


def quantization_of(choice: Choice, *, on_gpu: bool) -> Quantization:
    """Return how weights are quantised when they are loaded."""
    match choice:
        case "fp8-tensor":
            return Quantization("fp8", granularity="tensor")
        case "int4" if not on_gpu:
            return Quantization("int4", group_size=32)  # as GGUF files have them; GPUs take 128, which read less
        case _:
            return Quantization(_method(choice))


def cache_dtype(choice: Choice, config: ModelConfig, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of keys and values on a CPU that is as exact as products with such weights are.

    Products with integers round their inputs to 8 bits. Beside kept weights of 16 bits, keys and values have their
    dtype.
    """
    stored = kept(config.stored_linears, _method(choice))
    if stored is None:
        return dtype if choice in ("none", "keep") else torch.int8
    if stored.dense_dtype is None:
        return torch.int8
    return stored.dense_dtype if dtype == torch.float32 else dtype


def weight_form(choice: Choice, config: ModelConfig, runtime: ModelRuntime, max_model_len: int) -> WeightForm:
    """Return the form that a choice gives a model.

    Raises UnsupportedModelError: the model cannot have it.
    """
    stored = kept(config.stored_linears, _method(choice))
    if choice not in ("none", "keep"):
        name: str = choice
    elif stored is None or (stored.dense_dtype is not None and not DenseWeight.is_multiplied_in_cpp(runtime)):
        name = dtype_name(runtime.dtype)
    else:
        name = stored.form
    runtime = replace(runtime, quantization=quantization_of(choice, on_gpu=runtime.device.type != "cpu"))
    return WeightForm(choice, name, weight_bytes(config, runtime, max_model_len=max_model_len))


def other_forms(
    form: WeightForm, config: ModelConfig, runtime: ModelRuntime, max_model_len: int
) -> Iterator[WeightForm]:
    """Yield the forms that a model may have instead, the most exact first; none if the checkpoint is quantised."""
    if config.stored_linears is not None and not config.stored_linears.is_choice:
        return
    choices: tuple[Choice, ...] = ("none", "keep", "int8", "int4")
    if runtime.device.type != "cpu":
        choices = ("none", "fp8", "int4")
    for choice in choices:
        if choice == form.quantization:
            continue
        try:
            other = weight_form(choice, config, runtime, max_model_len)
        except UnsupportedModelError:
            continue  # a model whose sizes do not divide into such groups
        if other.type != form.type:
            yield other
