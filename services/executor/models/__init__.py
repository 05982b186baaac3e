"""Decoder models over a paged KV cache. They know torch and the kernels; not files, schedulers or gRPC."""

from services.executor.models.causal_lm import CausalLM
from services.executor.models.config import Architecture, ModelConfig
from services.executor.models.context import ForwardContext, KVCache, allocate_kv_caches
from services.executor.models.errors import UnsupportedModelError

__all__ = [
    "Architecture",
    "CausalLM",
    "ForwardContext",
    "KVCache",
    "ModelConfig",
    "UnsupportedModelError",
    "allocate_kv_caches",
]
