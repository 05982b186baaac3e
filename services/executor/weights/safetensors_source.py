"""Weights from a Hugging Face directory of safetensors files, one or many with an index."""

import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open

from scalellm.services.common.model_files import ModelFileError, brief, read_json_object, shown, shown_name
from scalellm.services.executor.model_config.errors import UnsupportedModelError
from scalellm.services.executor.models.weight_slot import WeightSlot

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_DTYPE_NAMES: Mapping[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int8: "I8",
    torch.int32: "I32",
    torch.int64: "I64",
}


_NOT_TEXT = re.compile(r"(?:model\.)?(?:vision_tower|multi_modal_projector)\..*")
_OF_TEXT = ((re.compile(r"model\.language_model\."), "model."), (re.compile(r"language_model\."), ""))


class SafetensorsSource:
    """An open safetensors checkpoint. The files are memory-mapped; a tensor costs memory only while it is copied.

    Of a model that reads images as well its language model is the checkpoint, with the names that it has alone.
    """

    def __init__(self, directory: Path) -> None:
        self._files: dict[str, Any] = {}
        self._stored_names: dict[str, str] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, str] = {}
        self._stack = ExitStack()
        try:
            for path, expected in _shards(directory).items():
                self._open(path, expected)
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor in the checkpoint."""
        return self._shapes

    @property
    def dtypes(self) -> Mapping[str, torch.dtype]:
        """Dtype of every tensor that has one of those that can be loaded."""
        by_name = {name: dtype for dtype, name in _DTYPE_NAMES.items()}
        return {name: by_name[dtype] for name, dtype in self._dtypes.items() if dtype in by_name}

    def native_name(self, name: str) -> str:
        """Return the name that a tensor has in the files."""
        return self._stored_names.get(name, name)

    def wrong_dtype(self, name: str, slot: WeightSlot) -> str | None:
        """Name the dtypes as the format does."""
        supported = [_DTYPE_NAMES[dtype] for dtype in slot.dtypes]
        dtype = self._dtypes[name]
        return None if dtype in supported else f"dtype {dtype}; supported: {', '.join(supported)}"

    def read(self, name: str, slot: WeightSlot, device: torch.device, on_bytes: Callable[[int], None]) -> None:
        """Fill a slot with the tensor, or with the window of it that the slot has; only that is read."""
        tensor = self._read(name) if slot.window is None else self._slice(name)[slot.window]
        slot.load(tensor, device)
        on_bytes(slot.num_bytes)

    def are_equal(self, first: str, second: str) -> bool:
        """Return whether two tensors have the same dtype, shape and numbers."""
        if self._dtypes[first] != self._dtypes[second] or self._shapes[first] != self._shapes[second]:
            return False
        return torch.equal(self._read(first), self._read(second))

    def _read(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._files[name].get_tensor(self._stored_names[name])
        return tensor

    def _slice(self, name: str) -> Any:
        return self._files[name].get_slice(self._stored_names[name])

    def _open(self, path: Path, expected: set[str] | None) -> None:
        try:
            if not path.is_file():
                raise UnsupportedModelError(f"{path} is missing")
            file = self._stack.enter_context(safe_open(path, framework="pt", device="cpu"))
            names = set(file.keys())
            if expected is not None and expected - names:
                raise UnsupportedModelError(
                    f"{path} lacks {shown_name(min(expected - names))}, which {INDEX_FILE} says it has"
                )
            for stored_name in names:
                if (name := _name_of_text(stored_name)) is None:
                    continue
                view = file.get_slice(stored_name)
                self._files[name], self._stored_names[name] = file, stored_name
                self._dtypes[name] = view.get_dtype()
                self._shapes[name] = tuple(view.get_shape())
        except (SafetensorError, OSError) as error:
            raise UnsupportedModelError(
                f"{path.parent / shown_name(path.name)}: not a complete safetensors file: {brief(error)}"
            ) from error


def has_weights(directory: Path) -> bool:
    """Return whether a directory holds a checkpoint, or the index of one."""
    return any((directory / name).is_file() for name in (SINGLE_FILE, INDEX_FILE))


def _name_of_text(stored_name: str) -> str | None:
    """Return the name of a tensor in a language model alone; None: it belongs to what reads images."""
    if _NOT_TEXT.fullmatch(stored_name):
        return None
    for prefix, name in _OF_TEXT:
        if found := prefix.match(stored_name):
            return name + stored_name[found.end() :]
    return stored_name


def _shards(directory: Path) -> dict[Path, set[str] | None]:
    """Map each file of the checkpoint to the tensors it must hold (None: whatever it holds)."""
    index = directory / INDEX_FILE
    if not index.is_file():
        return {directory / SINGLE_FILE: None}
    try:
        weight_map = read_json_object(index).get("weight_map")
    except ModelFileError as error:
        raise UnsupportedModelError(str(error)) from error
    if not isinstance(weight_map, dict):
        raise UnsupportedModelError(f"{index}: not a safetensors index: weight_map is {shown(weight_map)}")
    shards: dict[Path, set[str] | None] = {}
    names: dict[str, set[str]] = {}
    for tensor, file in weight_map.items():
        names.setdefault(file if isinstance(file, str) else repr(file), set()).add(tensor)
    for file, tensors in names.items():
        if Path(file).name != file:
            raise UnsupportedModelError(f"{index}: {shown(file)} must be a file name in the same directory")
        shards[directory / file] = tensors
    return shards
