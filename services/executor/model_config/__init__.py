"""A model's configuration, read from its files: shapes and arithmetic, not weights. Nothing here loads torch."""

from scalellm.services.executor.model_config.config import Architecture, ModelConfig
from scalellm.services.executor.model_config.errors import UnsupportedModelError
from scalellm.services.executor.model_config.presets import PRESETS, preset_config

__all__ = ["PRESETS", "Architecture", "ModelConfig", "UnsupportedModelError", "preset_config"]
