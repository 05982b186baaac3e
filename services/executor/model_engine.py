"""From settings to an engine that runs a real model: weights, KV cache, kernels, warm-up."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
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
    KVCache,
    ModelConfig,
    ModelRuntime,
    WeightMemory,
    allocate_kv_caches,
    dummy_model,
)
from scalellm.services.executor.models.context import kv_bytes_per_token
from scalellm.services.executor.models.shard import Shard
from scalellm.services.executor.placement import Placement
from scalellm.services.executor.ranks.following import follow
from scalellm.services.executor.ranks.group import Tell
from scalellm.services.executor.ranks.leading_runner import LeadingRunner
from scalellm.services.executor.ranks.told_masks import ToldMasks
from scalellm.services.executor.runner import Device, ModelRunner
from scalellm.services.executor.runner.warm_up import run_largest_step, warm_up
from scalellm.services.executor.threads import choose_num_threads
from scalellm.services.executor.weight_form import WeightForm, other_forms, quantization_of, weight_form
from scalellm.services.executor.weights import load_model
from scalellm.v1 import ranks_pb2

_LEAST_MODEL_LEN = 256
_GIB = 1024**3
_RECORDING_LIMIT = 0.5
"""Seconds for recording decode steps before serving: on an idle machine enough for 1 to about 16 rows of a small model.
Steps of few rows are recorded in advance because they are short, so that the extra time of recording shows most."""

_WAITING_IN_TORCH = ("fused_moe", "fused_moe_wna16", "paged_attention_decode", "qk_norm_rope_and_cache")
"""Ops of a decode step whose torch forms read device values on the host, so that no graph of them can be captured."""


@dataclass(frozen=True)
class ModelEngine:
    """An engine, its runner and ops, the form of its weights, and an alternative form for information."""

    engine: Engine
    runner: ModelRunner
    ops: Ops
    form: WeightForm
    other_form: WeightForm | None


@dataclass(frozen=True)
class _LoadedModel:
    """A rank's share of the model, with its caches and configuration."""

    model: CausalLM
    kv_caches: list[KVCache]
    config: EngineConfig
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
    shard: Shard | None = None,
    tell: Tell | None = None,
) -> ModelEngine:
    """Load the model at `path` (None: random weights), size its cache, and prepare everything that serving needs.

    Rank 0 of several ranks gets its `shard`, and `tell`, which sends plans to the other ranks. Those call
    `follow_model_engine`.

    Raises StartError, UnsupportedModelError, KVCacheTooSmallError, EngineConfigError.
    """
    device = placement.device
    loaded = _load_all(settings, placement, path, model_config, progress, shard or Shard())
    model, kv_caches, config = loaded.model, loaded.kv_caches, loaded.config
    runner = (
        ModelRunner(model, kv_caches, config, device)
        if tell is None
        else LeadingRunner(model, kv_caches, config, device, tell)
    )
    ops = model.runtime.ops
    step_times = None
    if ops.launch is not None or device.has_graphs:
        started = time.perf_counter()
        warm_up(runner, config, progress, grammars)
        step_times = fit_step_times(config, runner)
        progress(f"warm-up took {time.perf_counter() - started:.1f} s")
    elif num_rows := runner.record_steps(_RECORDING_LIMIT):
        progress(f"decode steps of 1 to {num_rows} rows are recorded")
    swap_cost = None if runner.host_cache is None else runner.host_cache.measure()
    is_guessing = settings.speculation == "auto" and not runner.overlaps
    speculator = suffix_speculator(config.target_itl) if is_guessing else None
    engine = Engine(config, runner, clock, swap_cost, grammars=grammars, step_times=step_times, speculator=speculator)
    return ModelEngine(engine, runner, ops, loaded.form, loaded.other_form)


def follow_model_engine(
    settings: ExecutorSettings,
    placement: Placement,
    path: Path | None,
    model_config: ModelConfig,
    shard: Shard,
    plans: Iterable[ranks_pb2.RankPlan],
) -> None:
    """Load this rank's share of the model, for a rank other than 0, and run rank 0's plans. Never returns.

    Raises EOFError once rank 0 is gone, the errors of `build_model_engine`, and whatever a step raises.
    """
    loaded = _load_all(settings, placement, path, model_config, lambda line: None, shard)
    config = loaded.config
    masks = ToldMasks(config.max_num_seqs, config.vocab_size)
    runner = ModelRunner(loaded.model, loaded.kv_caches, config, placement.device, masks=masks)
    follow(plans, runner, masks, config)


def _load_all(
    settings: ExecutorSettings,
    placement: Placement,
    path: Path | None,
    model_config: ModelConfig,
    progress: Callable[[str], None],
    shard: Shard,
) -> _LoadedModel:
    device, torch_device = placement.device, placement.device.torch_device
    runtime = ModelRuntime(
        _select_ops(settings, placement),
        placement.dtype,
        torch_device,
        quantization_of(placement.quantization, on_gpu=torch_device.type != "cpu"),
        shard=shard,
        fp8_fast_sums=settings.fp8_fast_sums,
        allocate=WeightMemory().allocate,
    )
    rank_config = shard.config_of_rank(model_config)
    # Sized before the weights are loaded, so that a refusal takes a second and not minutes.
    longest = settings.max_model_len or model_config.max_position_embeddings
    form = weight_form(placement.quantization, model_config, runtime, longest)
    others = other_forms(form, model_config, runtime, longest)
    free = _free_memory(device, settings)
    if form.num_bytes >= free:
        raise StartError(f"{settings.model}: {_does_not_fit(form, others, free)}")
    other_form = next(others, None)  # only one, because each takes the time of laying out a model
    sizes = _agreed(shard, torch_device, *_size_cache(settings, placement, rank_config, longest, free - form.num_bytes))
    if torch_device.type == "cpu" and settings.num_threads:
        torch.set_num_threads(settings.num_threads)
    of_ranks = "" if shard.is_whole else f" on each of {shard.size} ranks"
    progress(f"loading {settings.model}: {form}{of_ranks}{_instead(other_form)}")
    model = _load(path, model_config, runtime, sizes[1], progress)
    if torch_device.type == "cpu" and not settings.num_threads:
        torch.set_num_threads(choose_num_threads(model.first_projection, model_config.hidden_size, placement.dtype))
    if device.overlaps:
        # The largest step runs first, so that torch already holds the memory of activations when free memory is
        # measured.
        run_largest_step(
            model, _engine_config(settings, placement, model_config, *sizes), device, placement.kv_cache_dtype
        )
        own_sizes = _size_cache(settings, placement, rank_config, sizes[1], _free_memory(device, settings))
        sizes = _agreed(shard, torch_device, *own_sizes)
    (num_host_blocks,) = _agreed(shard, torch_device, placement.swap_space // placement.block_bytes(rank_config))
    config = _engine_config(settings, placement, model_config, *sizes, num_host_blocks=num_host_blocks)
    threads = f"; {torch.get_num_threads()} threads" if torch_device.type == "cpu" else ""
    library = runtime.ops.library
    instructions = "" if library is None else f"; kernels in C++ with {library.level} instructions"
    swap = f"; {config.num_host_blocks} more in host memory" if config.num_host_blocks else ""
    progress(
        f"KV cache: {config.num_blocks} blocks of {config.block_size} tokens{swap}; up to {config.max_model_len} "
        f"tokens per request{threads}{instructions}"
    )
    kv_caches = allocate_kv_caches(
        rank_config,
        config.num_blocks,
        config.block_size,
        dtype=placement.kv_cache_dtype,
        device=torch_device,
        ops=runtime.ops,
    )
    return _LoadedModel(model, kv_caches, config, form, other_form)


def _free_memory(device: Device, settings: ExecutorSettings) -> int:
    """Return the bytes that a rank may use: those of its GPU, or its share of the host's."""
    free = device.free_memory()
    return free if device.torch_device.type != "cpu" else free // settings.ranks_per_node


def _agreed(shard: Shard, device: torch.device, *numbers: int) -> tuple[int, ...]:
    """Return the minimum over all ranks of each number, because all ranks need caches of the same size."""
    least: list[int] = shard.collectives.all_gather(torch.tensor(numbers, device=device)).amin(0).tolist()
    return tuple(least)


def _engine_config(
    settings: ExecutorSettings,
    placement: Placement,
    model: ModelConfig,
    num_blocks: int,
    max_model_len: int,
    *,
    num_host_blocks: int = 0,
) -> EngineConfig:
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
    """Return the number of blocks and max_model_len. An unset max_model_len is reduced to what the cache can hold; a
    set one must fit.
    """
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
