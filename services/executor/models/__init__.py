"""Decoder models over a paged KV cache. They know torch and the kernels; not files, schedulers or gRPC."""

from scalellm.services.executor.model_config.config import Architecture, ModelConfig
from scalellm.services.executor.model_config.errors import UnsupportedModelError
from scalellm.services.executor.model_config.presets import PRESETS, preset_config
from scalellm.services.executor.models.causal_lm import CausalLM
from scalellm.services.executor.models.context import (
    DecodeRows,
    ForwardContext,
    KVCache,
    PrefillRows,
    allocate_kv_caches,
)
from scalellm.services.executor.models.dummy import dummy_model
from scalellm.services.executor.models.quantization import Quantization
from scalellm.services.executor.models.runtime import ModelRuntime
from scalellm.services.executor.models.weight_memory import WeightMemory

__all__ = [
    "PRESETS",
    "Architecture",
    "CausalLM",
    "DecodeRows",
    "ForwardContext",
    "KVCache",
    "ModelConfig",
    "ModelRuntime",
    "PrefillRows",
    "Quantization",
    "UnsupportedModelError",
    "WeightMemory",
    "allocate_kv_caches",
    "dummy_model",
    "preset_config",
]
