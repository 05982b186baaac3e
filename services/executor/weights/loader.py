"""From a path to a model: find the checkpoint, check it, allocate, fill."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from services.common.end_tokens import end_token_ids
from services.common.gguf_metadata import GgufError
from services.common.gguf_parts import gguf_models
from services.common.model_files import ModelFileError, read_json_object, shown_name
from services.executor.models.causal_lm import CausalLM
from services.executor.models.config import ModelConfig
from services.executor.models.errors import UnsupportedModelError
from services.executor.models.gguf_config import config_from_gguf
from services.executor.models.hf_config import config_from_hf
from services.executor.models.linear.stored_gguf import StoredGguf
from services.executor.models.runtime import ModelRuntime
from services.executor.models.weight_slot import WeightSlot, finish_all
from services.executor.weights.gguf_file import GgufFile
from services.executor.weights.gguf_source import GgufSource
from services.executor.weights.safetensors_source import SafetensorsSource
from services.executor.weights.source import WeightSource

GGUF_FILE = "model.gguf"
_EMBEDDING = "token_embd.weight"
_ROPE_FACTORS = "rope_freqs.weight"
# Tensors a checkpoint may hold that the model does not read: both are recomputed from the configuration.
_REDUNDANT = re.compile(r".*\.rotary_emb\.inv_freq|rope_freqs\.weight")


def read_model_config(path: Path) -> ModelConfig:
    """Return the configuration of a model directory or GGUF file without reading its weights.

    Raises UnsupportedModelError.
    """
    located = _locate(path)
    if located.is_dir():
        return _with_ends(path, _hf_config(located))
    with GgufFile(located) as file:
        return _with_ends(path, _gguf_config(file))


def weight_bytes(config: ModelConfig, runtime: ModelRuntime, *, max_model_len: int | None = None) -> int:
    """Return the bytes the loaded model will hold: its weights, and rotary tables for `max_model_len`."""
    return _skeleton(config, runtime, max_model_len).num_bytes()


def load_model(
    path: Path,
    runtime: ModelRuntime,
    *,
    config: ModelConfig | None = None,
    max_model_len: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[CausalLM, ModelConfig]:
    """Load a model directory (`model.gguf`, any one `*.gguf`, or config.json with safetensors) or a `.gguf` file.

    Files are mapped and converted tensor by tensor, so the peak is near the final size. Everything is checked before
    the weights are allocated. `config` is what `read_model_config` returned, for who has it already. `on_progress` gets
    (bytes done, bytes in total) of the model's own memory. Raises UnsupportedModelError for an unknown architecture or
    quantisation, and for missing, damaged or surplus tensors.
    """
    config = config or read_model_config(path)
    path = _locate(path)
    if path.is_dir():
        with SafetensorsSource(path) as source:
            _check_tied(path, config, source)
            return _fill(path, config, source, runtime, max_model_len, on_progress), config
    with GgufFile(path) as file:
        return _fill(path, config, GgufSource(file, config), runtime, max_model_len, on_progress), config


def _fill(
    path: Path,
    config: ModelConfig,
    source: WeightSource,
    runtime: ModelRuntime,
    max_model_len: int | None,
    on_progress: Callable[[int, int], None] | None,
) -> CausalLM:
    if max_model_len is not None and max_model_len > config.max_position_embeddings:
        raise UnsupportedModelError(
            f"max_model_len {max_model_len} exceeds the model's limit, "
            f"max_position_embeddings {config.max_position_embeddings}"
        )
    _check(path, config, _slots(_skeleton(config, runtime, 1)), source)
    model = CausalLM(config, runtime, max_model_len=max_model_len)
    slots = _slots(model)
    done, total = 0, sum(slot.num_bytes for slot in slots)

    def report(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        if on_progress is not None and num_bytes:
            on_progress(done, total)

    for slot in slots:
        if (name := _name_in(source, slot)) is not None:
            source.read(name, slot, runtime.device, report)
    finish_all(slots)
    return model


def _slots(model: CausalLM) -> list[WeightSlot]:
    return [*model.weight_slots(), *model.kv_scale_slots()]


def _name_in(source: WeightSource, slot: WeightSlot) -> str | None:
    """Return the name under which the checkpoint has what belongs into a slot, None if it has nothing."""
    return next((name for name in (slot.name, *slot.aliases) if name in source.shapes), None)


def _skeleton(config: ModelConfig, runtime: ModelRuntime, max_model_len: int | None) -> CausalLM:
    """Return the model without its memory."""
    return CausalLM(config, replace(runtime, device=torch.device("meta")), max_model_len=max_model_len)


def _check(path: Path, config: ModelConfig, slots: Sequence[WeightSlot], source: WeightSource) -> None:
    """Refuse a checkpoint whose tensors are not exactly those of the model: a surplus bias is a wrong answer too."""
    shapes = source.shapes
    required = [slot for slot in slots if not slot.optional]
    missing = [slot.name for slot in required if _name_in(source, slot) is None]
    if missing:
        raise UnsupportedModelError(
            f"{path}: {len(missing)} of {len(required)} tensors are missing, the first is {missing[0]}"
        )
    for slot in slots:
        name = _name_in(source, slot)
        if name is not None and not slot.takes_shape(shapes[name]):
            raise UnsupportedModelError(
                f"{path}: {source.native_name(name)} has shape {list(shapes[name])}, "
                f"the configuration asks for {list(slot.shape)}"
            )
        if name is not None and (wrong := source.wrong_dtype(name, slot)):
            raise UnsupportedModelError(f"{path}: {source.native_name(name)} has {wrong}")
    wanted = {name for slot in slots for name in (slot.name, *slot.aliases)}
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    surplus = [name for name in shapes if name not in wanted | tied and not _REDUNDANT.fullmatch(name)]
    if surplus:
        raise UnsupportedModelError(
            f"{path}: {len(surplus)} tensors are not part of {config.architecture}, "
            f"the first is {shown_name(source.native_name(surplus[0]))}"
        )


def _check_tied(path: Path, config: ModelConfig, source: SafetensorsSource) -> None:
    """Refuse two matrices of which the configuration says that they are one: some readers take one, some both."""
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    is_there = head in source.shapes and embedding in source.shapes
    if config.tie_word_embeddings and is_there and not source.are_equal(head, embedding):
        raise UnsupportedModelError(
            f"{path}: config.json: tie_word_embeddings is true, but {head} differs from {embedding}; "
            f"set it to false, or leave {head} out"
        )


def _locate(path: Path) -> Path:
    """Return the GGUF file, or the directory of safetensors, that `path` stands for."""
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


def _with_ends(path: Path, config: ModelConfig) -> ModelConfig:
    try:
        return replace(config, eos_token_ids=end_token_ids(path, config.vocab_size))
    except (ModelFileError, GgufError) as error:
        raise UnsupportedModelError(str(error)) from error


def _hf_config(directory: Path) -> ModelConfig:
    try:
        raw = read_json_object(directory / "config.json")
        modelopt = read_json_object(directory / "hf_quant_config.json", missing={})
    except ModelFileError as error:
        raise UnsupportedModelError(str(error)) from error
    if not raw.get("quantization_config") and modelopt:  # where ModelOpt wrote it before it was in both
        raw["quantization_config"] = {"quant_method": "modelopt"} | (modelopt.get("quantization") or {})
    return config_from_hf(raw)


def _gguf_config(file: GgufFile) -> ModelConfig:
    try:
        if _EMBEDDING not in file.tensors:
            raise UnsupportedModelError(f"GGUF: the tensor {_EMBEDDING} is missing")
        factors = file.dequantize(_ROPE_FACTORS).tolist() if _ROPE_FACTORS in file.tensors else None
        config = config_from_gguf(file.metadata, set(file.tensors), file.tensors[_EMBEDDING].shape[0], factors)
    except GgufError as error:  # values are decoded when asked for
        raise UnsupportedModelError(str(error)) from error
    return replace(config, stored_linears=StoredGguf(GgufSource(file, config).types))
