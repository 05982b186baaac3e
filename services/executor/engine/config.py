"""The engine's settings."""

import enum
from dataclasses import dataclass

from scalellm.services.common.field_rules import MAX_LOGPROBS


class CapacityPolicy(enum.Enum):
    """Policy for a KV cache that cannot hold all requests at once; the names are TensorRT-LLM's."""

    MAX_UTILIZATION = "max_utilization"
    """Admit what fits now; when blocks run out, preempt the lowest-priority, latest sequence."""
    GUARANTEED_NO_EVICT = "guaranteed_no_evict"
    """Admit only what can run to its max_tokens, so that nothing is ever preempted."""


class EngineConfigError(ValueError):
    """Settings that cannot work together; the message says which, and what to change."""


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Limits and policies of one engine; sizes are in tokens, blocks or sequences, times in seconds.

    `max_model_len` is the longest prompt plus output; `target_itl` is the inter-token latency that prefill chunks
    must leave to running decodes (None: chunks take the whole token budget), `min_prefill_chunk` the least number of
    prefill tokens per step even so. `num_host_blocks` are blocks of host memory for the cache content of preempted
    sequences; with 0 it is computed again. A sequence gets runs of `block_run` neighbouring blocks where possible,
    because memory is read faster in order. `vocab_size` and `eos_token_ids` are the model's.
    """

    num_blocks: int
    max_model_len: int
    vocab_size: int
    eos_token_ids: frozenset[int]
    block_size: int = 16
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    capacity_policy: CapacityPolicy = CapacityPolicy.MAX_UTILIZATION
    enable_prefix_cache: bool = True
    max_logprobs: int = MAX_LOGPROBS
    target_itl: float | None = None
    min_prefill_chunk: int = 32
    num_host_blocks: int = 0
    block_run: int = 1

    def __post_init__(self) -> None:
        for name in ("num_blocks", "vocab_size", "block_size", "max_num_seqs", "min_prefill_chunk", "block_run"):
            if getattr(self, name) < 1:
                raise EngineConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if outside := sorted(token for token in self.eos_token_ids if not 0 <= token < self.vocab_size):
            raise EngineConfigError(
                f"eos_token_ids has {outside[0]}; token ids are between 0 and {self.vocab_size - 1}"
            )
        if self.num_host_blocks < 0:
            raise EngineConfigError(f"num_host_blocks must be at least 0, got {self.num_host_blocks}")
        if self.max_model_len < 2:
            raise EngineConfigError(f"max_model_len must hold a prompt and an output token, got {self.max_model_len}")
        capacity = self.num_blocks * self.block_size
        if capacity < self.max_model_len:
            # One sequence alone must always fit, so that no admitted sequence can be stuck.
            raise EngineConfigError(
                f"num_blocks ({self.num_blocks}) of block_size {self.block_size} hold {capacity} tokens, fewer "
                f"than max_model_len ({self.max_model_len}): raise num_blocks or lower max_model_len"
            )
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise EngineConfigError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_num_seqs "
                f"({self.max_num_seqs}): every running sequence decodes one token per step"
            )
        if self.target_itl is not None and not self.target_itl > 0:
            raise EngineConfigError(f"target_itl must be above 0 seconds, got {self.target_itl}")
