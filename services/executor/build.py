"""Builds the engine from its settings: model, KV cache, limits. Every refusal is one line that says what to do."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from kernels import Ops
from scalellm.v1 import executor_pb2, link_pb2
from services.common.lifecycle import StartError
from services.common.model_store import ModelStoreError, resolve
from services.common.tokenizer_digest import TokenizerSourceError, tokenizer_sha256
from services.executor.config import ExecutorSettings
from services.executor.engine.config import CapacityPolicy, EngineConfig, EngineConfigError
from services.executor.engine.engine import Engine
from services.executor.engine.fake_model_runner import STEP_TIME_PRESETS, FakeModelRunner
from services.executor.engine.kv_cache_size import KVCacheTooSmallError, num_kv_blocks
from services.executor.memory import free_memory
from services.executor.models import ModelConfig, ModelRuntime, UnsupportedModelError, allocate_kv_caches
from services.executor.runner import ModelRunner
from services.executor.threads import choose_num_threads
from services.executor.weights import load_model, read_model_config, weight_bytes

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_LEAST_MODEL_LEN = 256
_FAKE_BLOCKS = 4096


@dataclass(frozen=True)
class LoadedEngine:
    """An engine that is ready, and what it says of itself."""

    engine: Engine
    welcome: link_pb2.Welcome
    info: executor_pb2.GetExecutorInfoResponse


def build_engine(settings: ExecutorSettings, progress: Callable[[str], None]) -> LoadedEngine:
    """Load the model and make its engine.

    Args:
        settings: What to load and how.
        progress: Gets a line of text per stage.

    Raises StartError.
    """
    try:
        path = resolve(settings.model, settings.home)
        model_config = read_model_config(path)
        digest = tokenizer_sha256(path)
        if settings.engine == "fake":
            engine = _fake_engine(settings, model_config)
        else:
            engine = _model_engine(settings, path, model_config, progress)
    except (
        ModelStoreError,
        UnsupportedModelError,
        TokenizerSourceError,
        KVCacheTooSmallError,
        EngineConfigError,
    ) as error:
        raise StartError(str(error)) from error
    return _describe(settings, path, model_config, engine, digest)


def _describe(
    settings: ExecutorSettings, path: Path, model: ModelConfig, engine: Engine, digest: bytes
) -> LoadedEngine:
    config = engine.config
    instance_id = uuid.uuid4().hex
    name = settings.model_name or (path.stem if path.is_file() else path.name)
    fake = settings.engine == "fake"
    return LoadedEngine(
        engine,
        link_pb2.Welcome(
            instance_id=instance_id,
            model=name,
            tokenizer_sha256=digest,
            block_size=config.block_size,
            num_blocks=config.num_blocks,
            max_model_len=config.max_model_len,
            max_num_seqs=config.max_num_seqs,
            vocab_size=config.vocab_size,
        ),
        executor_pb2.GetExecutorInfoResponse(
            instance_id=instance_id,
            model=name,
            architecture=model.architecture,
            dtype=settings.dtype,
            device=settings.device,
            backend="fake" if fake else "torch",
            block_size=config.block_size,
            max_model_len=config.max_model_len,
            max_num_seqs=config.max_num_seqs,
        ),
    )


def _engine_config(settings: ExecutorSettings, model: ModelConfig, num_blocks: int, max_model_len: int) -> EngineConfig:
    return EngineConfig(
        num_blocks=num_blocks,
        max_model_len=max_model_len,
        vocab_size=model.vocab_size,
        eos_token_ids=frozenset(model.eos_token_ids),
        block_size=settings.block_size,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=max(settings.max_num_batched_tokens, settings.max_num_seqs),
        capacity_policy=CapacityPolicy(settings.capacity_policy),
        enable_prefix_cache=settings.prefix_cache,
        target_itl=settings.target_itl_ms / 1e3 if settings.target_itl_ms is not None else None,
    )


def _fake_engine(settings: ExecutorSettings, model: ModelConfig) -> Engine:
    step_time = STEP_TIME_PRESETS[settings.fake_preset]
    max_model_len = settings.max_model_len or model.max_position_embeddings
    num_blocks = settings.num_blocks or max(_FAKE_BLOCKS, -(-max_model_len // settings.block_size))
    runner = FakeModelRunner(model.vocab_size, model.eos_token_ids, step_time)
    return Engine(_engine_config(settings, model, num_blocks, max_model_len), runner)


def _model_engine(
    settings: ExecutorSettings, path: Path, model_config: ModelConfig, progress: Callable[[str], None]
) -> Engine:
    dtype, device = _DTYPES[settings.dtype], torch.device(settings.device)
    # Sized before anything is loaded: a refusal takes a second, not minutes of reading weights.
    longest = settings.max_model_len or model_config.max_position_embeddings
    runtime = ModelRuntime(Ops(), dtype, device)
    weights = weight_bytes(model_config, runtime, max_model_len=longest)
    free = free_memory()
    if weights >= free:
        raise StartError(
            f"{settings.model}: the weights take {weights / 2**30:.2f} GiB in {settings.dtype}, "
            f"{free / 2**30:.2f} GiB of memory are free: free some, or choose a smaller model or --dtype bfloat16"
        )
    num_blocks, max_model_len = _size_cache(settings, model_config, dtype, longest, free - weights)
    torch.set_num_threads(
        settings.num_threads or choose_num_threads(model_config.hidden_size, model_config.intermediate_size, dtype)
    )
    progress(f"loading {settings.model}: {weights / 2**20:.0f} MiB in {settings.dtype}")
    reported = 0

    def on_progress(done: int, total: int) -> None:
        nonlocal reported
        percent = 100 * done // max(1, total)
        if percent >= reported + 10:
            reported = percent
            progress(f"weights {percent} %")

    model, _ = load_model(path, runtime, max_model_len=max_model_len, on_progress=on_progress)
    config = _engine_config(settings, model_config, num_blocks, max_model_len)
    progress(
        f"KV cache: {num_blocks} blocks of {config.block_size} tokens; up to {max_model_len} tokens per request; "
        f"{torch.get_num_threads()} threads"
    )
    kv_caches = allocate_kv_caches(model_config, num_blocks, config.block_size, dtype=dtype, device=device)
    return Engine(config, ModelRunner(model, kv_caches, config, device))


def _size_cache(
    settings: ExecutorSettings, model: ModelConfig, dtype: torch.dtype, longest: int, free: int
) -> tuple[int, int]:
    """Number of blocks, and max_model_len: an unset one shrinks to what the cache holds, a set one must fit."""
    bytes_per_token = model.kv_bytes_per_token(dtype)
    num_blocks = settings.num_blocks
    if num_blocks is None and settings.kv_cache_memory is not None:
        num_blocks = max(1, settings.kv_cache_memory // (bytes_per_token * settings.block_size))
    if settings.max_model_len is None:
        fitting = num_blocks or int(free * settings.memory_fraction) // (bytes_per_token * settings.block_size)
        longest = max(min(longest, fitting * settings.block_size), min(longest, _LEAST_MODEL_LEN))
    blocks = num_kv_blocks(
        bytes_per_token=bytes_per_token,
        block_size=settings.block_size,
        max_model_len=longest,
        num_blocks=num_blocks,
        free_bytes=free,
        memory_fraction=settings.memory_fraction,
    )
    return blocks, longest
