"""The engine's limits: the settings' values, or defaults that depend on the kind of device."""

from __future__ import annotations

from dataclasses import dataclass

from scalellm.services.executor.config import ExecutorSettings
from scalellm.services.executor.engine.config import CapacityPolicy, EngineConfig
from scalellm.services.executor.model_config import ModelConfig

_CPU_RUN = 64  # tokens that attention reads together, and the CPU itself ahead where their blocks are neighbours


@dataclass(frozen=True)
class Limits:
    """Sizes of blocks and steps, with defaults filled in.

    Attributes:
        block_size: Tokens of a cache block.
        max_num_seqs: Rows of a step.
        max_num_batched_tokens: Tokens of a step.
        block_run: Blocks that should be neighbours in memory.
    """

    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_run: int


def choose_limits(settings: ExecutorSettings, *, on_gpu: bool) -> Limits:
    """Return the limits of the settings, with defaults for the kind of device."""
    # A GPU's kernels load a block table's entry per tile of keys, so that a page should be as long as a tile; a chunk
    # of 8192 tokens fills it. A CPU is full at a few hundred, and smaller pages share more.
    block_size = settings.block_size or (64 if on_gpu else 16)
    max_num_seqs = settings.max_num_seqs or (256 if on_gpu else 64)
    return Limits(
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max(settings.max_num_batched_tokens or (8192 if on_gpu else 512), max_num_seqs),
        block_run=1 if on_gpu else max(1, _CPU_RUN // block_size),
    )


def output_interval(settings: ExecutorSettings, *, on_gpu: bool) -> float:
    """Return the time between frames with results, in seconds: the setting's, or a default for the kind of device."""
    default_ms = 0.0 if on_gpu else 10.0
    return (default_ms if settings.output_interval_ms is None else settings.output_interval_ms) / 1e3


def engine_config(
    settings: ExecutorSettings,
    limits: Limits,
    model: ModelConfig,
    num_blocks: int,
    max_model_len: int,
    *,
    num_host_blocks: int = 0,
) -> EngineConfig:
    """Return the engine's limits and policies. Raises EngineConfigError."""
    return EngineConfig(
        num_blocks=num_blocks,
        max_model_len=max_model_len,
        vocab_size=model.vocab_size,
        eos_token_ids=frozenset(model.eos_token_ids),
        block_size=limits.block_size,
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        capacity_policy=CapacityPolicy(settings.capacity_policy),
        enable_prefix_cache=settings.prefix_cache,
        num_host_blocks=num_host_blocks,
        block_run=limits.block_run,
        target_itl=settings.target_itl_ms / 1e3 if settings.target_itl_ms is not None else None,
    )
