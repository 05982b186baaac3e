"""From the path of a model to its ModelConfig."""

from dataclasses import replace
from pathlib import Path

from scalellm.services.common.end_tokens import end_token_ids
from scalellm.services.common.gguf_metadata import GgufError
from scalellm.services.common.gguf_parts import gguf_models
from scalellm.services.common.model_files import ModelFileError, read_json_object
from scalellm.services.executor.gguf_file import GgufFile
from scalellm.services.executor.model_config.config import ModelConfig
from scalellm.services.executor.model_config.errors import UnsupportedModelError
from scalellm.services.executor.model_config.gguf_config import config_from_gguf
from scalellm.services.executor.model_config.hf_config import config_from_hf

GGUF_FILE = "model.gguf"
_EMBEDDING = "token_embd.weight"
_ROPE_FACTORS = "rope_freqs.weight"


def read_shape(path: Path) -> ModelConfig:
    """Return the configuration of a model directory or GGUF file, of the latter without `stored_linears`.

    Raises UnsupportedModelError.
    """
    located = locate(path)
    if located.is_dir():
        return config_of_directory(path, located)
    with GgufFile(located) as file:
        return config_of_gguf(path, file)


def locate(path: Path) -> Path:
    """Return the GGUF file, or the directory of safetensors, that `path` stands for. Raises UnsupportedModelError."""
    if path.is_file():
        if path.suffix != ".gguf":
            raise UnsupportedModelError(f"{path}: a model file must be a .gguf file")
        return path
    if not path.is_dir():
        raise UnsupportedModelError(f"{path} does not exist; a model is a directory or a .gguf file")
    if (path / GGUF_FILE).is_file():
        return path / GGUF_FILE
    if (path / "config.json").is_file():
        return path
    files = gguf_models(path)
    if len(files) == 1:
        return files[0]
    if files:
        raise UnsupportedModelError(
            f"{path} holds {len(files)} .gguf files; give the path of one, or name it {GGUF_FILE}"
        )
    raise UnsupportedModelError(f"{path} holds neither a .gguf file nor a config.json with safetensors")


def config_of_directory(path: Path, directory: Path) -> ModelConfig:
    """Return the configuration of a directory of safetensors, which `path` stands for. Raises UnsupportedModelError."""
    try:
        raw = read_json_object(directory / "config.json")
        modelopt = read_json_object(directory / "hf_quant_config.json", missing={})
    except ModelFileError as error:
        raise UnsupportedModelError(str(error)) from error
    if not raw.get("quantization_config") and modelopt:  # where ModelOpt wrote it before it was in both
        raw["quantization_config"] = {"quant_method": "modelopt"} | (modelopt.get("quantization") or {})
    return _with_ends(path, config_from_hf(raw))


def config_of_gguf(path: Path, file: GgufFile) -> ModelConfig:
    """Return the configuration of a GGUF file, which `path` stands for, without `stored_linears`.

    Raises UnsupportedModelError.
    """
    try:
        if _EMBEDDING not in file.tensors:
            raise UnsupportedModelError(f"GGUF: the tensor {_EMBEDDING} is missing")
        factors = file.dequantize(_ROPE_FACTORS).tolist() if _ROPE_FACTORS in file.tensors else None
        config = config_from_gguf(file.metadata, set(file.tensors), file.tensors[_EMBEDDING].shape[0], factors)
    except GgufError as error:  # values are decoded when asked for
        raise UnsupportedModelError(str(error)) from error
    return _with_ends(path, config)


def _with_ends(path: Path, config: ModelConfig) -> ModelConfig:
    try:
        return replace(config, eos_token_ids=end_token_ids(path, config.vocab_size))
    except (ModelFileError, GgufError) as error:
        raise UnsupportedModelError(str(error)) from error
