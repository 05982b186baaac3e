"""The tensors of a GGUF file, read in place and dequantised in pieces by the `gguf` package."""

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import gguf
import numpy as np
import numpy.typing as npt

from scalellm.services.common.gguf_metadata import GgufError, GgufMetadata
from scalellm.services.common.gguf_parts import gguf_parts
from scalellm.services.common.model_files import shown, shown_name
from scalellm.services.executor.model_config.errors import UnsupportedModelError

_DEFAULT_ALIGNMENT = 32
_MOST_ALIGNMENT = 1 << 20
_MOST_DIMENSIONS = 4
_FIXED_HEADER = struct.Struct("<4sIQQ")  # magic, version, number of tensors, number of metadata values
_STEP_BYTES = 1 << 18
"""Stored bytes per call of `dequantize`. Its temporaries are many times that; when they fit the caches and the
allocator reuses their pages, a file is read five times as fast as with 1 MiB."""


@dataclass(frozen=True)
class GgufTensor:
    """The place of a tensor in a file; `shape` is row-major (GGUF itself lists the fastest dimension first).

    `part` numbers the files of a split model from 0 on; `offset` is one in that file.
    """

    shape: tuple[int, ...]
    type: gguf.GGMLQuantizationType
    offset: int
    num_bytes: int
    part: int = 0

    @property
    def num_rows(self) -> int:
        """Rows lie along the last dimension, whatever is stacked before it; each value of a vector is one."""
        return math.prod(self.shape[:-1]) if len(self.shape) > 1 else self.shape[0]


class GgufFile:
    """Metadata and tensors of one GGUF model (versions 2 and 3, little-endian), mapped into memory.

    Args:
        path: Its only file, or the first one of a split model, whose metadata count.

    Raises UnsupportedModelError when a file is no GGUF file, ends early, or has a tensor of an unknown type, and when
    parts are missing or do not belong together.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._data: list[mmap.mmap] = []
        self.tensors: Mapping[str, GgufTensor]
        tensors: dict[str, GgufTensor] = {}
        try:
            self._parts = gguf_parts(path)
            metadata = [GgufMetadata(part) for part in self._parts]
            for number, part in enumerate(self._parts):
                self._check_part(number, metadata[number])
                with part.open("rb") as file:
                    self._data.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
                table = self._read_tensor_table(number, metadata[number])
                if twice := next((name for name in table if name in tensors), None):
                    raise GgufError(f"{part}: the tensor {shown_name(twice)} is in an earlier part as well")
                tensors |= table
        except GgufError as error:
            raise UnsupportedModelError(str(error)) from error
        except (struct.error, UnicodeDecodeError) as error:
            raise UnsupportedModelError(f"{path}: not a readable GGUF file: tensor table: {error}") from error
        self.metadata: Mapping[str, Any] = metadata[0]
        self.tensors = tensors

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for data in self._data:
            data.close()

    def dequantize(
        self, name: str, first_row: int = 0, num_rows: int | None = None, columns: slice | None = None
    ) -> npt.NDArray[np.float32]:
        """Return rows of a tensor as float32, a copy: `[num_rows, columns]`, and `[num_rows]` of a vector.

        `columns` are all or a range that begins and ends with blocks.

        Raises UnsupportedModelError for a type that the `gguf` package cannot dequantise.
        """
        tensor = self.tensors[name]
        num_rows = tensor.num_rows - first_row if num_rows is None else num_rows
        raw = self.raw_rows(name, first_row, num_rows, columns)
        try:
            # As one wide row: gguf loops in Python over groups of 16 rows, which costs more than the arithmetic.
            values: npt.NDArray[np.float32] = gguf.dequantize(raw.reshape(1, -1), tensor.type)
        except NotImplementedError as error:
            raise UnsupportedModelError(
                f"{self._path}: {name} has type {tensor.type.name}, which the gguf package cannot dequantise"
            ) from error
        return values.reshape(num_rows, -1) if len(tensor.shape) > 1 else values.reshape(num_rows)

    def raw_rows(self, name: str, first_row: int, num_rows: int, columns: slice | None = None) -> npt.NDArray[np.uint8]:
        """Return rows of a tensor as they are in the file, `[num_rows, bytes of a row]`, a copy.

        `columns` are all or a range that begins and ends with blocks.
        """
        tensor = self.tensors[name]
        row_bytes = tensor.num_bytes // tensor.num_rows
        start = tensor.offset + first_row * row_bytes
        rows = np.frombuffer(self._data[tensor.part], np.uint8, num_rows * row_bytes, start).reshape(
            num_rows, row_bytes
        )
        if columns is not None:
            length, block_bytes = gguf.GGML_QUANT_SIZES[tensor.type]
            rows = rows[:, columns.start // length * block_bytes : columns.stop // length * block_bytes]
        # A copy, because nothing may point into the mapping when it is closed.
        return rows.copy()

    def rows_per_step(self, name: str) -> int:
        """Return how many rows to dequantise at a time."""
        tensor = self.tensors[name]
        return max(1, _STEP_BYTES * tensor.num_rows // tensor.num_bytes)

    def _check_part(self, number: int, metadata: GgufMetadata) -> None:
        path, count = self._parts[number], metadata.typed("split.count", int) or 1
        if count != len(self._parts):
            what = f"one of {count} parts" if count > 1 else "not a part of a split model"
            raise GgufError(f"{path}: split.count says that it is {what}, but its name says otherwise")
        if count > 1 and metadata.typed("split.no", int) != number:
            raise GgufError(f"{path}: split.no is {shown(metadata.get('split.no'))}; by its name it is {number}")

    def _read_tensor_table(self, part: int, metadata: GgufMetadata) -> dict[str, GgufTensor]:
        path, data = self._parts[part], self._data[part]
        _, _, num_tensors, _ = _FIXED_HEADER.unpack_from(data)
        # The table follows the last value; an entry is a length, the key, a type code and the value.
        table = _Cursor(
            data,
            _FIXED_HEADER.size + sum(8 + len(key.encode()) + len(metadata.encoded(key)) for key in metadata),
        )
        tensors: dict[str, GgufTensor] = {}
        for _ in range(num_tensors):
            name, tensor = self._read_tensor(path, table)
            if name in tensors:
                raise GgufError(f"{path}: the tensor {shown_name(name)} is there twice")
            tensors[name] = tensor
        alignment = metadata.typed("general.alignment", int)
        alignment = _DEFAULT_ALIGNMENT if alignment is None else alignment
        if not 0 < alignment <= _MOST_ALIGNMENT:
            raise GgufError(f"{path}: general.alignment is {alignment}; it must be between 1 and {_MOST_ALIGNMENT}")
        start = math.ceil(table.position / alignment) * alignment
        for name, tensor in tensors.items():
            end = start + tensor.offset + tensor.num_bytes
            if end > len(data):
                raise UnsupportedModelError(f"{path}: cut off: {name} ends at byte {end}, the file has {len(data)}")
        return {name: replace(tensor, offset=start + tensor.offset, part=part) for name, tensor in tensors.items()}

    def _read_tensor(self, path: Path, table: "_Cursor") -> tuple[str, GgufTensor]:
        name = table.string()
        num_dimensions = table.integer("I")
        if not 0 < num_dimensions <= _MOST_DIMENSIONS:
            raise GgufError(
                f"{path}: {shown_name(name)} has {num_dimensions} dimensions; supported: 1 to {_MOST_DIMENSIONS}"
            )
        shape = tuple(reversed([table.integer("Q") for _ in range(num_dimensions)]))
        code, offset = table.integer("I"), table.integer("Q")
        try:
            kind = gguf.GGMLQuantizationType(code)
            block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError) as error:
            raise UnsupportedModelError(f"{path}: {shown_name(name)} has the unknown tensor type {code}") from error
        # A row of a vector is one value.
        if 0 in shape or shape[-1] % block_size or (len(shape) == 1 and block_size > 1):
            raise UnsupportedModelError(
                f"{path}: {shown_name(name)} has shape {list(shape)}, which type {kind.name} cannot have"
            )
        return name, GgufTensor(shape, kind, offset, math.prod(shape) // block_size * block_bytes)


class _Cursor:
    """Reads little-endian values one after the other; raises struct.error at the end of the data."""

    def __init__(self, data: mmap.mmap, position: int) -> None:
        self._data = data
        self.position = position

    def integer(self, form: str) -> int:
        value = struct.unpack_from(f"<{form}", self._data, self.position)[0]
        self.position += struct.calcsize(f"<{form}")
        return int(value)

    def string(self) -> str:
        length = self.integer("Q")
        if self.position + length > len(self._data):
            raise struct.error(f"a string of {length} bytes at byte {self.position} of {len(self._data)}")
        self.position += length
        return self._data[self.position - length : self.position].decode("utf-8")
