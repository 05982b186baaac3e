"""Weight loading: a model directory or a GGUF file in, a ready CausalLM out."""

from scalellm.services.executor.model_config.errors import UnsupportedModelError
from scalellm.services.executor.weights.loader import load_model, read_model_config, weight_bytes

__all__ = ["UnsupportedModelError", "load_model", "read_model_config", "weight_bytes"]
