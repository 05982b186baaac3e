"""The device of the model, and the choices that depend on it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from scalellm.services.common.lifecycle import StartError
from scalellm.services.executor.config import ExecutorSettings
from scalellm.services.executor.limits import Limits, choose_limits
from scalellm.services.executor.memory import free_memory
from scalellm.services.executor.models import ModelConfig
from scalellm.services.executor.models.context import kv_bytes_per_token
from scalellm.services.executor.runner import CpuDevice, CudaDevice, Device
from scalellm.services.executor.weight_form import Choice, cache_dtype, choose_quantization

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_KV_CACHE_DTYPES = {**_DTYPES, "int8": torch.int8}
_PAGE_SIZES = (16, 32, 64)
_GIB = 1024**3


@dataclass(frozen=True)
class Placement:
    """The device of a rank, and the settings that depend on it, with defaults filled in."""

    device: Device
    dtype: torch.dtype
    quantization: Choice
    kv_cache_dtype: torch.dtype
    limits: Limits
    memory_fraction: float
    swap_space: int
    """Bytes of host memory for this rank."""

    def block_bytes(self, model: ModelConfig) -> int:
        """Return the bytes of a cache block in all layers."""
        return kv_bytes_per_token(model, self.kv_cache_dtype) * self.limits.block_size


def choose_placement(settings: ExecutorSettings, model: ModelConfig, rank: int = 0) -> Placement:
    """Find the device of a rank and choose the defaults that depend on it and on the model.

    Raises StartError if the requested device does not exist.
    """
    on_gpu = _use_gpu(settings)
    device: Device = (
        CudaDevice(rank % settings.ranks_per_node, has_graphs=not settings.enforce_eager) if on_gpu else CpuDevice()
    )
    dtype = _DTYPES.get(settings.dtype, torch.bfloat16 if on_gpu else torch.float32)
    if on_gpu and settings.block_size not in (None, *_PAGE_SIZES):
        raise StartError(f"--block-size {settings.block_size}: a GPU's kernels take pages of {_PAGE_SIZES} tokens")
    quantization = choose_quantization(settings, dtype, on_gpu=on_gpu)
    return Placement(
        device=device,
        dtype=dtype,
        quantization=quantization,
        kv_cache_dtype=_kv_cache_dtype(settings, dtype if on_gpu else cache_dtype(quantization, model, dtype), on_gpu),
        limits=choose_limits(settings, on_gpu=on_gpu),
        memory_fraction=settings.memory_fraction or (0.9 if on_gpu else 0.25),
        swap_space=_swap_space(settings, on_gpu) // settings.ranks_per_node,
    )


def _kv_cache_dtype(settings: ExecutorSettings, default: torch.dtype, on_gpu: bool) -> torch.dtype:
    if settings.kv_cache_dtype == "fp8":
        return torch.float8_e4m3fn
    if settings.kv_cache_dtype == "auto":
        return default
    if on_gpu:
        raise StartError(f"--kv-cache-dtype {settings.kv_cache_dtype}: a GPU's kernels take auto and fp8")
    return _KV_CACHE_DTYPES[settings.kv_cache_dtype]


def _swap_space(settings: ExecutorSettings, on_gpu: bool) -> int:
    free = free_memory()
    if settings.swap_space is None:
        return min(4 * _GIB, free // 2) if on_gpu else 0
    if settings.swap_space > free:
        raise StartError(f"--swap-space {settings.swap_space / _GIB:.2f} GiB: {free / _GIB:.2f} GiB of memory are free")
    return settings.swap_space


def _use_gpu(settings: ExecutorSettings) -> bool:
    if settings.device == "cpu":
        return False
    found = torch.cuda.is_available()
    if found and torch.cuda.device_count() < settings.ranks_per_node:
        raise StartError(
            f"--tensor-parallel {settings.num_ranks}: each of the {settings.ranks_per_node} ranks of this host takes a "
            f"GPU, and there are {torch.cuda.device_count()}"
        )
    if settings.device == "cuda" and not found:
        raise StartError(
            f"--device cuda: torch {torch.__version__} finds no CUDA device; see what nvidia-smi says, and whether "
            "this torch was built for CUDA, or take --device cpu"
        )
    return found
