"""From settings to an engine that runs a real model: weights, KV cache, kernels, warm-up."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from scalellm.kernels import Ops, select_ops
from scalellm.services.common.lifecycle import StartError
from scalellm.services.executor.config import ExecutorSettings
from scalellm.services.executor.engine.config import EngineConfig
from scalellm.services.executor.engine.engine import Engine
from scalellm.services.executor.engine.grammar import GrammarCompiler
from scalellm.services.executor.engine.kv_cache_size import num_kv_blocks
from scalellm.services.executor.engine.speculation import suffix_speculator
from scalellm.services.executor.engine.step_warm_up import fit_step_times
from scalellm.services.executor.limits import engine_config
from scalellm.services.executor.models import (
    CausalLM,
    ModelConfig,
    ModelRuntime,
    WeightMemory,
    allocate_kv_caches,
    dummy_model,
)
from scalellm.services.executor.models.context import kv_bytes_per_token
from scalellm.services.executor.placement import Placement
from scalellm.services.executor.runner import ModelRunner
from scalellm.services.executor.runner.warm_up import run_largest_step, warm_up
from scalellm.services.executor.threads import choose_num_threads
from scalellm.services.executor.weight_form import WeightForm, other_forms, quantization_of, weight_form
from scalellm.services.executor.weights import load_model

_LEAST_MODEL_LEN = 256
_GIB = 1024**3
_WAITING_IN_TORCH = ("fused_moe", "fused_moe_wna16", "paged_attention_decode", "qk_norm_rope_and_cache")
"""Ops of a decode step whose torch forms read values of the device on the host: no graph can be captured of them."""


@dataclass(frozen=True)
class ModelEngine:
    """An engine, the runner and ops it works with, the form of its weights and one that they might have had."""

    engine: Engine
    runner: ModelRunner
    ops: Ops
    form: WeightForm
    other_form: WeightForm | None


def build_model_engine(
    settings: ExecutorSettings,
    placement: Placement,
    path: Path | None,
    model_config: ModelConfig,
    progress: Callable[[str], None],
    grammars: GrammarCompiler | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> ModelEngine:
    """Load the model at `path` (None: random weights), size its cache, and prepare everything that serving needs.

    Raises StartError, UnsupportedModelError, KVCacheTooSmallError, EngineConfigError.
    """
    device, torch_device = placement.device, placement.device.torch_device
    runtime = ModelRuntime(
        _select_ops(settings, placement),
        placement.dtype,
        torch_device,
        quantization_of(placement.quantization, on_gpu=torch_device.type != "cpu"),
        fp8_fast_sums=settings.fp8_fast_sums,
        allocate=WeightMemory().allocate,
    )
    # Sized before anything is loaded: a refusal takes a second, not minutes of reading weights.
    longest = settings.max_model_len or model_config.max_position_embeddings
    form = weight_form(placement.quantization, model_config, runtime, longest)
    others = other_forms(form, model_config, runtime, longest)
    free = device.free_memory()
    if form.num_bytes >= free:
        raise StartError(f"{settings.model}: {_does_not_fit(form, others, free)}")
    other_form = next(others, None)  # no more of them: each is a model laid out
    sizes = _size_cache(settings, placement, model_config, longest, free - form.num_bytes)
    if torch_device.type == "cpu" and settings.num_threads:
        torch.set_num_threads(settings.num_threads)
    progress(f"loading {settings.model}: {form}{_instead(other_form)}")
    model = _load(path, model_config, runtime, sizes[1], progress)
    if torch_device.type == "cpu" and not settings.num_threads:
        torch.set_num_threads(choose_num_threads(model.first_projection, model_config.hidden_size, placement.dtype))
    if device.overlaps:
        # The memory of a step beside weights and cache is known once the largest step ran; torch keeps it.
        run_largest_step(
            model, _engine_config(settings, placement, model_config, *sizes), device, placement.kv_cache_dtype
        )
        sizes = _size_cache(settings, placement, model_config, sizes[1], device.free_memory())
    config = _engine_config(settings, placement, model_config, *sizes)
    threads = f"; {torch.get_num_threads()} threads" if torch_device.type == "cpu" else ""
    swap = f"; {config.num_host_blocks} more in host memory" if config.num_host_blocks else ""
    progress(
        f"KV cache: {config.num_blocks} blocks of {config.block_size} tokens{swap}; up to {config.max_model_len} "
        f"tokens per request{threads}"
    )
    kv_caches = allocate_kv_caches(
        model_config,
        config.num_blocks,
        config.block_size,
        dtype=placement.kv_cache_dtype,
        device=torch_device,
        ops=runtime.ops,
    )
    runner = ModelRunner(model, kv_caches, config, device)
    step_times = None
    if runtime.ops.launch is not None or device.has_graphs:
        started = time.perf_counter()
        warm_up(runner, config, progress, grammars)
        step_times = fit_step_times(config, runner)
        progress(f"warm-up took {time.perf_counter() - started:.1f} s")
    swap_cost = None if runner.host_cache is None else runner.host_cache.measure()
    is_guessing = settings.speculation == "auto" and not runner.overlaps
    speculator = suffix_speculator(config.target_itl) if is_guessing else None
    engine = Engine(config, runner, clock, swap_cost, grammars=grammars, step_times=step_times, speculator=speculator)
    return ModelEngine(engine, runner, runtime.ops, form, other_form)


def _engine_config(
    settings: ExecutorSettings, placement: Placement, model: ModelConfig, num_blocks: int, max_model_len: int
) -> EngineConfig:
    num_host_blocks = placement.swap_space // placement.block_bytes(model)
    return engine_config(settings, placement.limits, model, num_blocks, max_model_len, num_host_blocks=num_host_blocks)


def _select_ops(settings: ExecutorSettings, placement: Placement) -> Ops:
    try:
        ops = select_ops(
            placement.device.capability,
            dtype=placement.dtype,
            kv_cache_dtype=placement.kv_cache_dtype,
            overrides=settings.kernels,
            build_dir=settings.home / "kernels",
        )
    except ValueError as error:
        raise StartError(f"--kernels: {error}") from error
    waiting = [op for op in _WAITING_IN_TORCH if ops.backends[op] == "torch"]
    if placement.device.has_graphs and waiting:
        raise StartError(
            f"{', '.join(waiting)}: the torch form waits for the device, which a captured decode step cannot: add "
            "--enforce-eager, or leave --kernels out on a GPU of compute capability 8.0 or more"
        )
    return ops


def _does_not_fit(form: WeightForm, others: Iterator[WeightForm], free: int) -> str:
    fitting = (f"--quantization {other.quantization} ({other})" for other in others if other.num_bytes < free)
    return (
        f"the weights do not fit: {form}, and {free / 2**20:.0f} MiB of memory are free; free some, or take "
        f"{next(fitting, 'a smaller model')}"
    )


def _instead(other: WeightForm | None) -> str:
    return "" if other is None else f" (--quantization {other.quantization}: {other})"


def _load(
    path: Path | None,
    config: ModelConfig,
    runtime: ModelRuntime,
    max_model_len: int,
    progress: Callable[[str], None],
) -> CausalLM:
    if path is None:
        return dummy_model(config, runtime, max_model_len=max_model_len)
    reported = 0

    def on_progress(done: int, total: int) -> None:
        nonlocal reported
        percent = 100 * done // max(1, total)
        if percent >= reported + 10:
            reported = percent
            progress(f"weights {percent} %")

    return load_model(path, runtime, config=config, max_model_len=max_model_len, on_progress=on_progress)[0]


def _size_cache(
    settings: ExecutorSettings, placement: Placement, model: ModelConfig, longest: int, free: int
) -> tuple[int, int]:
    """Number of blocks, and max_model_len: an unset one shrinks to what the cache holds, a set one must fit."""
    block_bytes, block_size = placement.block_bytes(model), placement.limits.block_size
    num_blocks = settings.num_blocks
    if num_blocks is None and settings.kv_cache_memory is not None:
        num_blocks = max(1, settings.kv_cache_memory // block_bytes)
    if settings.max_model_len is None:
        fitting = num_blocks or int(free * placement.memory_fraction) // block_bytes
        longest = max(min(longest, fitting * block_size), min(longest, _LEAST_MODEL_LEN))
    blocks = num_kv_blocks(
        bytes_per_token=kv_bytes_per_token(model, placement.kv_cache_dtype),
        block_size=block_size,
        max_model_len=longest,
        num_blocks=num_blocks,
        free_bytes=free,
        memory_fraction=placement.memory_fraction,
    )
    return blocks, longest
