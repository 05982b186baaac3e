"""From a path to a model: find the checkpoint, check it, allocate, fill."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from scalellm.services.common.model_files import shown_name
from scalellm.services.executor.gguf_file import GgufFile
from scalellm.services.executor.model_config import ModelConfig, UnsupportedModelError
from scalellm.services.executor.model_config.files import config_of_directory, config_of_gguf, locate
from scalellm.services.executor.models.causal_lm import CausalLM
from scalellm.services.executor.models.linear.stored_dense import StoredDense
from scalellm.services.executor.models.linear.stored_gguf import StoredGguf
from scalellm.services.executor.models.runtime import ModelRuntime
from scalellm.services.executor.models.shard import Shard
from scalellm.services.executor.models.weight_slot import WeightSlot, finish_all
from scalellm.services.executor.weights.gguf_source import GgufSource
from scalellm.services.executor.weights.safetensors_source import SafetensorsSource, has_weights
from scalellm.services.executor.weights.source import WeightSource

# Tensors a checkpoint may hold that the model does not read: both are recomputed from the configuration.
_REDUNDANT = re.compile(r".*\.rotary_emb\.inv_freq|rope_freqs\.weight")


def read_model_config(path: Path) -> ModelConfig:
    """Return the configuration of a model directory or GGUF file without reading its weights, which need not be there.

    Raises UnsupportedModelError.
    """
    located = locate(path)
    if located.is_dir():
        config = config_of_directory(path, located)
        if config.stored_linears is not None or not has_weights(located):
            return config
        with SafetensorsSource(located) as source:
            return replace(config, stored_linears=StoredDense(source.dtypes))
    with GgufFile(located) as file:
        config = config_of_gguf(path, file)
        return replace(config, stored_linears=StoredGguf(GgufSource(file, config).types))


def weight_bytes(config: ModelConfig, runtime: ModelRuntime, *, max_model_len: int | None = None) -> int:
    """Return the bytes this rank of the loaded model will hold: weights, and rotary tables for `max_model_len`."""
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
    path = locate(path)
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
    # All ranks check all of it, each loads its own.
    _check(path, config, _slots(_skeleton(config, replace(runtime, shard=Shard()), 1)), source)
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
    """Return the name of the checkpoint's tensor for a slot, None if it has none."""
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
    """Refuse a checkpoint with two different matrices that the configuration declares tied, since readers disagree on
    which to use.
    """
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    is_there = head in source.shapes and embedding in source.shapes
    if config.tie_word_embeddings and is_there and not source.are_equal(head, embedding):
        raise UnsupportedModelError(
            f"{path}: config.json: tie_word_embeddings is true, but {head} differs from {embedding}; "
            f"set it to false, or leave {head} out"
        )
