"""Settings of the executor service."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ByteSize, Field
from pydantic_settings import NoDecode

from scalellm.services.common.settings import LinkedSettings, Port, settings_config


def _parse_kernels(value: Any) -> Any:
    """Parse `sample=torch,all=triton` into a mapping. Names of ops and forms are checked when forms are chosen."""
    if not isinstance(value, str):
        return value
    pairs = [item.partition("=") for item in value.split(",") if item.strip()]
    return {name.strip(): form.strip() for name, _, form in pairs}


class ExecutorSettings(LinkedSettings):
    """Settings of the executor, which runs token sequences through the model and owns the paged KV cache."""

    model_config = settings_config("executor")

    port: Port = 50061
    """Port to listen on; 0 takes a free one."""
    model: str = "smollm2-135m-instruct"
    """A name from `scalellm models list`, a pulled repository of the Hugging Face Hub (org/name, org/name:Q4_K_M),
    a directory with a model, or a .gguf file."""
    model_name: str = ""
    """Name under which the model is served; default: its own, or that of the directory or file."""
    home: Path = Path.home() / ".cache" / "scalellm"
    """Folder into which `scalellm models pull` puts models."""
    engine: Literal["model", "fake"] = "model"
    """model, or fake: scripted tokens and modelled step times on the real block manager, for load and fault tests."""
    fake_preset: Literal["instant", "h200-llama-8b"] = "instant"
    """Step-time model of the fake engine."""
    load_format: Literal["auto", "dummy"] = "auto"
    """auto: the model's own weights. dummy: random ones, made on the device; --model may then be a preset, too."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of activations, and of weights that are not quantised; default: bfloat16 on a GPU, float32 on a CPU."""
    quantization: Literal["auto", "none", "keep", "fp8", "fp8-tensor", "int8", "int4"] = "auto"
    """Form of the weights of linear layers. none: --dtype. keep: as stored in the file, including the blocks of a GGUF
    file and, on a CPU, 16-bit numbers. auto: keep on a CPU with a compiler, else none. fp8: a scale per row.
    fp8-tensor: a scale per matrix. int8: a scale per 128 inputs. int4: a scale and a zero point per 128 inputs, on a
    CPU per 32. A quantised checkpoint is not changed."""
    fp8_fast_sums: bool = False
    """On a GPU, add up products of fp8 weights in the short accumulators of its matrix units (14 bits on Hopper)
    instead of float32: faster for prompts, less exact. `make gpu GPU_ARGS=--first` measures both."""
    kv_cache_dtype: Literal["auto", "float32", "bfloat16", "float16", "int8", "fp8"] = "auto"
    """Type of cached keys and values. auto: that of activations; but on a CPU int8 with quantised weights, as products
    round inputs to 8 bits there, and 16 bits with 16-bit weights. int8: with a scale per token and head. fp8: e4m3. A
    GPU supports auto and fp8."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the model; auto takes a GPU where torch finds one."""
    kernels: Annotated[dict[str, Literal["torch", "triton", "cpp"]], NoDecode, BeforeValidator(_parse_kernels)] = Field(
        default_factory=dict
    )
    """Forms of ops that override the automatic choice: OP=torch, OP=triton or OP=cpp, comma-separated; OP "all": all
    ops."""
    enforce_eager: bool = False
    """Launch decode steps op by op instead of replaying captured graphs: slower, easier to debug."""
    tensor_parallel: Annotated[int, Field(ge=1, le=64)] = 1
    """Ranks that compute each token together: processes that each hold a share of the model, on a GPU of their own.
    The number of heads must be divisible by it. On a CPU it is for tests only: sums between processes cost more than
    ranks save."""
    expert_parallel: Annotated[int, Field(ge=1, le=64)] = 1
    """Groups of ranks among which a model's experts are distributed; within a group each expert is divided. Must divide
    --tensor-parallel."""
    nodes: Annotated[int, Field(ge=1, le=64)] = 1
    """Hosts among which the ranks are divided, as many on each. An executor service runs on each of them, with the same
    settings of the model; that of node 0 serves, the others wait for it."""
    node_rank: Annotated[int, Field(ge=0, lt=64)] = 0
    """Number of this host among --nodes, from 0 on."""
    leader: str = "127.0.0.1:50071"
    """host:port on which node 0 listens for the other nodes, and to which they connect. Beyond the loopback interface
    it needs --link-token-file. Ranks exchange sums on ports that are chosen as they start, unencrypted: give the nodes
    a network of their own."""
    num_threads: Annotated[int, Field(ge=0)] = 0
    """Threads of the engine's matrix products; 0 chooses by measurement at start."""
    max_model_len: Annotated[int, Field(ge=2)] | None = None
    """Longest prompt plus output, in tokens; default: what the model was trained for and the cache can hold."""
    max_num_seqs: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Sequences that run at once; default: 256 on a GPU, 64 on a CPU."""
    max_num_batched_tokens: Annotated[int, Field(ge=1)] | None = None
    """Most tokens of one step; long prompts are computed in chunks. Default: 8192 on a GPU, 512 on a CPU."""
    block_size: Annotated[int, Field(ge=1, le=256)] | None = None
    """Tokens per cache block; default: 64 on a GPU, 16 on a CPU. A GPU's kernels take 16, 32 and 64, those of a CPU
    in C++ multiples of 16; other sizes are computed in plain torch there."""
    num_blocks: Annotated[int, Field(ge=1)] | None = None
    """Cache blocks; default: from --kv-cache-memory or --memory-fraction."""
    kv_cache_memory: ByteSize | None = None
    """Memory for the KV cache, such as 2GiB; default: from --memory-fraction."""
    memory_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the memory that is free once the weights are loaded, for the KV cache; default: 0.9 of a GPU's, 0.25."""
    swap_space: ByteSize | None = None
    """Host memory for the KV cache of preempted sequences, such as 8GiB; default: 4GiB beside a GPU, else none."""
    capacity_policy: Literal["max_utilization", "guaranteed_no_evict"] = "max_utilization"
    """max_utilization admits what fits now and preempts when the cache is full; guaranteed_no_evict never preempts."""
    prefix_cache: bool = True
    """Keep the cache blocks of computed prompts, and share them between requests of the same tenant."""
    speculation: Literal["auto", "off"] = "auto"
    """auto: draft tokens from texts that a sample may be repeating (its prompt, its own text, a prediction, recent
    answers to the same tenant), verify the drafts in the same step, and accept those that equal the drawn tokens, so
    that texts do not change but take fewer steps. The number of drafts follows measured step times: none under load.
    Only on a CPU, if a whole step is computed in C++."""
    target_itl_ms: Annotated[float, Field(gt=0)] | None = 500.0
    """While sequences decode, the sizes of prefill chunks and the number of drafts are limited so that a step takes
    about this long at most, in milliseconds."""
    output_interval_ms: Annotated[float, Field(ge=0, le=100)] | None = None
    """The tokens of steps that together take less than this many milliseconds are sent to schedulers in one message.
    First tokens and ends of answers are sent at once, with all others. Default: 10 on a CPU, where services and engine
    share the cores, and 0 on a GPU."""
    max_engine_restarts: Annotated[int, Field(ge=0)] = 3
    """Engine crashes in a row, without a completed start in between, after which the service gives up. The loss of a
    node does not count; the service waits for it."""

    @property
    def num_ranks(self) -> int:
        """Number of processes that hold the model: 1 for the fake engine, which only reports `tensor_parallel`
        ranks.
        """
        return self.tensor_parallel if self.engine == "model" else 1

    @property
    def ranks_per_node(self) -> int:
        """Processes on each host that hold the model."""
        return self.num_ranks // self.nodes

    @property
    def own_ranks(self) -> range:
        """The ranks on this host."""
        return range(self.node_rank * self.ranks_per_node, (self.node_rank + 1) * self.ranks_per_node)
