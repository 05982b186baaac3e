"""The key-value part of a GGUF file, read in place, decoded on demand and kept.

Tensors are not read, so this takes milliseconds, while the `gguf` package's reader, which makes an object of every
vocabulary entry, takes many seconds.
"""

import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from scalellm.services.common.model_files import shown

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING = 8
_ARRAY = 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_LENGTH = struct.Struct("<Q")
_MOST_KEY_BYTES = 65535
"""Longest key that the format's specification allows."""
_T = TypeVar("_T")


class GgufError(ValueError):
    """A file is not a readable GGUF file; the message says which and why."""


@dataclass(frozen=True, slots=True)
class _Span:
    """One value: its type code and the bytes that encode it."""

    type: int
    start: int
    end: int


class GgufMetadata(Mapping[str, Any]):
    """The metadata of a GGUF file (versions 2 and 3, little-endian), decoded entry by entry when asked for.

    Raises GgufError when the file cannot be read, is not GGUF, or ends early.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._spans: dict[str, _Span] = {}
        self._values: dict[str, Any] = {}
        try:
            with path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._scan()
        except OSError as error:
            raise GgufError(f"{path}: cannot be read: {error.strerror or error}") from error
        except (struct.error, UnicodeDecodeError, ValueError) as error:
            raise GgufError(f"{path}: not a readable GGUF file: {error}") from error

    def __getitem__(self, key: str) -> Any:
        if key not in self._values:
            span = self._spans[key]
            try:
                self._values[key] = self._decode(span.type, span.start)
            except UnicodeDecodeError as error:
                raise GgufError(f"{self._path}: {key} is not UTF-8: {error}") from error
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._spans)

    def __len__(self) -> int:
        return len(self._spans)

    def encoded(self, key: str) -> bytes:
        """Return the encoded value of `key` in the file, type code first. Equal bytes mean equal values."""
        span = self._spans[key]
        return struct.pack("<I", span.type) + self._data[span.start : span.end]

    def typed(self, key: str, kind: type[_T]) -> _T | None:
        """Return the value of `key`, None if there is none. Raises GgufError if it is of another type."""
        value = self.get(key)
        if value is None or (isinstance(value, kind) and isinstance(value, bool) == (kind is bool)):
            return value
        raise GgufError(f"{self._path}: {key} is {shown(value)}; it must be of type {kind.__name__}")

    def array(self, key: str, kind: type[_T]) -> list[_T] | None:
        """Return the array of `key`, None if there is none. Raises GgufError if its entries are of another type."""
        values: list[Any] | None = self.typed(key, list)
        if values is not None and not set(map(type, values)) <= {kind}:
            raise GgufError(f"{self._path}: {key} must be an array of {kind.__name__}")
        return values

    def _scan(self) -> None:
        if self._data[:4] != _MAGIC:
            raise ValueError("it does not start with 'GGUF'")
        version, _, num_values = struct.unpack_from("<IQQ", self._data, 4)
        if version not in _VERSIONS:
            raise ValueError(f"version {version} is not supported; supported: 2, 3")
        position = 24
        for _ in range(num_values):
            start = self._string_end(position)
            if start - position - 8 > _MOST_KEY_BYTES:
                raise ValueError(f"a key of {start - position - 8} bytes; at most {_MOST_KEY_BYTES} are allowed")
            key = self._data[position + 8 : start].decode("utf-8")
            (kind,) = struct.unpack_from("<I", self._data, start)
            try:
                position = self._end(kind, start + 4)
            except ValueError as error:
                raise ValueError(f"{shown(key)}: {error}") from error
            except OverflowError as error:
                raise ValueError(f"{shown(key)}: a length that no file has") from error
            if position > len(self._data):
                raise ValueError(f"it ends inside the value of {shown(key)}")
            if key in self._spans:  # readers disagree on which of two values counts
                raise ValueError(f"the key {shown(key)} is there twice")
            self._spans[key] = _Span(kind, start + 4, position)

    def _string_end(self, position: int) -> int:
        return position + 8 + int(_LENGTH.unpack_from(self._data, position)[0])

    def _end(self, kind: int, position: int) -> int:
        """Return the position after the value of type `kind` that starts at `position`."""
        if kind == _STRING:
            return self._string_end(position)
        if kind != _ARRAY:
            return position + struct.calcsize(self._format(kind))
        item, length = struct.unpack_from("<IQ", self._data, position)
        position += 12
        if item == _ARRAY:
            raise ValueError("arrays of arrays are not supported")
        if item != _STRING:
            return int(position + length * struct.calcsize(self._format(item)))
        # A vocabulary: in place, since a call per token is what reading the header would take.
        data, unpack = self._data, _LENGTH.unpack_from
        for _ in range(length):
            position += 8 + unpack(data, position)[0]
        return position

    def _decode(self, kind: int, position: int) -> Any:
        if kind == _STRING:
            return self._data[position + 8 : self._string_end(position)].decode("utf-8")
        if kind != _ARRAY:
            return struct.unpack_from("<" + self._format(kind), self._data, position)[0]
        item, length = struct.unpack_from("<IQ", self._data, position)
        position += 12
        if item != _STRING:
            return list(struct.unpack_from(f"<{length}{self._format(item)}", self._data, position))
        values: list[str] = []
        data, unpack = self._data, _LENGTH.unpack_from  # in place, as above
        for _ in range(length):
            start = position + 8
            position = start + unpack(data, position)[0]
            values.append(data[start:position].decode())
        return values

    @staticmethod
    def _format(kind: int) -> str:
        if kind not in _SCALARS:
            raise ValueError(f"unknown value type {kind}")
        return _SCALARS[kind]
