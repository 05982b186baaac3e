"""Settings of the executor service."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import ByteSize, Field

from services.common.settings import Port, ServiceSettings, settings_config


class ExecutorSettings(ServiceSettings):
    """The GPU executor: runs token sequences through the model, owns the paged KV cache."""

    model_config = settings_config("executor")

    port: Port = 50061
    """Port to listen on; 0 takes a free one."""
    model: str = "smollm2-135m-instruct"
    """A name from `scalellm models list`, a directory with a model, or a .gguf file."""
    model_name: str = ""
    """Name under which the model is served; default: the name or the directory's name."""
    home: Path = Path.home() / ".cache" / "scalellm"
    """Where `scalellm models pull` puts models."""
    engine: Literal["model", "fake"] = "model"
    """model, or fake: scripted tokens and modelled step times on the real block manager, for load and fault tests."""
    fake_preset: Literal["instant", "h200-llama-8b"] = "instant"
    """Step-time model of the fake engine."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of weights and activations."""
    device: Literal["cpu"] = "cpu"
    """Where the model runs."""
    num_threads: Annotated[int, Field(ge=0)] = 0
    """Threads of the engine's matrix products; 0 chooses by measurement at start."""
    max_model_len: Annotated[int, Field(ge=2)] | None = None
    """Longest prompt plus output, in tokens; default: what the model was trained for and the cache can hold."""
    max_num_seqs: Annotated[int, Field(ge=1, le=4096)] = 64
    """Sequences that run at once."""
    max_num_batched_tokens: Annotated[int, Field(ge=1)] = 512
    """Most tokens of one step; long prompts are computed in chunks."""
    block_size: Annotated[int, Field(ge=1, le=256)] = 16
    """Tokens per cache block."""
    num_blocks: Annotated[int, Field(ge=1)] | None = None
    """Cache blocks; default: from --kv-cache-memory or --memory-fraction."""
    kv_cache_memory: ByteSize | None = None
    """Memory for the KV cache, such as 2GiB; default: from --memory-fraction."""
    memory_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """Share of the memory that is free once the weights are loaded, for the KV cache."""
    capacity_policy: Literal["max_utilization", "guaranteed_no_evict"] = "max_utilization"
    """max_utilization admits what fits now and preempts when the cache is full; guaranteed_no_evict never preempts."""
    prefix_cache: bool = True
    """Keep computed prompts and share them between requests of the same tenant."""
    target_itl_ms: Annotated[float, Field(gt=0)] | None = 500.0
    """While sequences decode, prompts are computed in chunks that keep a step about this short."""
    max_engine_restarts: Annotated[int, Field(ge=0)] = 3
    """Engine crashes in a row, without a finished start in between, after which the service gives up."""
