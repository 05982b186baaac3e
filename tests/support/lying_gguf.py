"""GGUF files, written byte by byte, so that each count, length, type and offset in them can lie."""

from __future__ import annotations

import copy
import math
import random
import struct
from dataclasses import dataclass, field
from typing import Any

U32, I32, F32, BOOL, STRING, ARRAY, U64 = 4, 5, 6, 7, 8, 9, 10
_FORMS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_COUNTS = (0, 1, 5, 255, 2**16, 2**31, 2**32 - 1, 2**32, 2**40, 2**61, 2**63, 2**64 - 1)
_NUMBERS = (0, 1, 2, 3, 7, 999, 2**16, 2**31 - 1, 2**31, 2**32 - 1)
_FLOATS = (0.0, -1.0, 1e-45, 1e38, -1e38, math.nan, math.inf, -math.inf)
_STRINGS = ("", "x", "gpt2", "llama", "\x00", "none", "yarn", "a" * 70_000)
F32_TENSOR = 0


@dataclass
class Value:
    """A metadata value; of an array, `item` is the type of its entries, and the length written may be another."""

    kind: int
    value: Any
    item: int = U32
    length: int | None = None
    raw: bytes | None = None
    """Written instead of the value."""

    def encoded(self) -> bytes:
        """Return the type code and the value."""
        if self.raw is not None:
            return struct.pack("<I", self.kind) + self.raw
        if self.kind != ARRAY:
            return struct.pack("<I", self.kind) + _encode(self.kind, self.value, self.length)
        length = len(self.value) if self.length is None else self.length
        items = b"".join(_encode(self.item, item) for item in self.value)
        return struct.pack("<IIQ", self.kind, self.item, length) + items


@dataclass
class Tensor:
    """An entry of the tensor table; dimensions as GGUF lists them, the fastest first."""

    name: str
    dims: list[int]
    kind: int = F32_TENSOR
    offset: int = 0
    num_dims: int | None = None


@dataclass
class Gguf:
    """A file. Tensors hold zeros, which take no space in this object."""

    values: list[tuple[str, Value]] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    magic: bytes = b"GGUF"
    version: int = 3
    num_values: int | None = None
    num_tensors: int | None = None
    alignment: int = 32
    num_bytes: int = 0
    """Bytes of tensor data."""

    def add(self, key: str, kind: int, value: Any, item: int = U32) -> None:
        """Append a metadata value."""
        self.values.append((key, Value(kind, value, item)))

    def add_tensor(self, name: str, *shape: int) -> None:
        """Append a tensor of float32 zeros; the shape is row-major."""
        self.tensors.append(Tensor(name, list(reversed(shape)), offset=self.num_bytes))
        self.num_bytes += -(-math.prod(shape) * 4 // self.alignment) * self.alignment

    def encoded(self) -> bytes:
        """Return the file."""
        num_tensors = len(self.tensors) if self.num_tensors is None else self.num_tensors
        num_values = len(self.values) if self.num_values is None else self.num_values
        parts = [self.magic, struct.pack("<IQQ", self.version, num_tensors, num_values)]
        parts += [_string(key) + value.encoded() for key, value in self.values]
        for tensor in self.tensors:
            num_dims = len(tensor.dims) if tensor.num_dims is None else tensor.num_dims
            parts.append(_string(tensor.name) + struct.pack("<I", num_dims))
            parts.append(struct.pack(f"<{len(tensor.dims)}QIQ", *tensor.dims, tensor.kind, tensor.offset))
        head = b"".join(parts)
        return head + bytes(-len(head) % self.alignment) + bytes(self.num_bytes)


def _encode(kind: int, value: Any, length: int | None = None) -> bytes:
    return _string(value, length) if kind == STRING else struct.pack("<" + _FORMS[kind], value)


def _string(text: str, length: int | None = None) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(data) if length is None else length) + data


def mutate_gguf(file: Gguf, rng: random.Random) -> tuple[bytes, str]:
    """Return a file with one or two lies in it, and what was done, in words."""
    file = copy.deepcopy(file)
    done = [_lie(file, rng) for _ in range(rng.choice((1, 1, 1, 2)))]
    data = file.encoded()
    match rng.randrange(16):
        case 0:
            data = data[: rng.randrange(len(data))]
            done.append(f"cut off after {len(data)} bytes")
        case 1:
            place = rng.randrange(max(1, len(data) - file.num_bytes))
            data = data[:place] + bytes([rng.randrange(256)]) + data[place + 1 :]
            done.append(f"byte {place} changed")
    return data, "; ".join(done)


def _lie(file: Gguf, rng: random.Random) -> str:
    match rng.randrange(12):
        case 0:
            name = rng.choice(("num_values", "num_tensors", "version"))
            limit = 2**32 if name == "version" else 2**64
            setattr(file, name, rng.choice([count for count in _COUNTS if count < limit]))
            return f"{name} is {getattr(file, name)}"
        case 1 | 2 | 3 | 4 if file.tensors and rng.random() < 0.75:
            return _lie_in_table(rng.choice(file.tensors), rng)
        case 5:
            key, _ = file.values.pop(rng.randrange(len(file.values)))
            return f"{key} is missing"
        case 6:
            place = rng.randrange(len(file.values))
            key, _ = file.values[place]
            file.values.insert(0, (key, Value(U32, rng.choice(_NUMBERS))))
            return f"{key} is there twice"
        case 7:
            key = rng.choice(("general.alignment", "split.count", "llama.rope.scaling.type", "llama.unknown_scale"))
            file.values.append((key, _any_value(rng)))
            return f"{key} is {_shown(file.values[-1][1])}"
        case _:
            return _lie_in_value(*rng.choice(file.values), rng)


def _lie_in_value(key: str, value: Value, rng: random.Random) -> str:
    match rng.randrange(8):
        case 0:
            value.kind = rng.choice((*_FORMS, STRING, ARRAY, 13, 2**31))
            value.raw = rng.randbytes(rng.choice((0, 1, 4, 8, 16)))
            return f"{key} has type {value.kind} and {len(value.raw)} random bytes"
        case 1 if value.kind in (ARRAY, STRING):
            value.length = rng.choice(_COUNTS)
            return f"{key} says it has {value.length} entries"
        case 2:
            depth = rng.choice((1, 2, 500, 20_000))
            value.kind = ARRAY
            value.raw = struct.pack("<IQ", ARRAY, 1) * depth + struct.pack("<IQ", U32, 0)
            return f"{key} is {depth} arrays in each other"
        case 3 | 4 if value.kind == ARRAY and value.value:
            place = rng.randrange(len(value.value))
            if value.item == STRING:
                value.value[place] = rng.choice((*_STRINGS, value.value[0]))
            else:
                numbers = _FLOATS if value.item in (F32, 12) else (0, 1, 3, 6, 99)
                value.value[place] = rng.choice(numbers)
            return f"{key}[{place}] is {value.value[place]!r:.60}"
        case 5 if value.kind == ARRAY:
            del value.value[rng.randrange(len(value.value) + 1) :]
            return f"{key} has {len(value.value)} entries"
        case 6 if value.kind == STRING:
            value.kind, value.raw = STRING, struct.pack("<Q", 3) + b"\xff\xfe\x80"
            return f"{key} is not UTF-8"
        case _:
            other = _any_value(rng, value.kind)
            value.kind, value.value, value.item = other.kind, other.value, other.item
            return f"{key} is {_shown(other)}"


def _any_value(rng: random.Random, kind: int | None = None) -> Value:
    """Return an extreme value, mostly of the type given."""
    kind = kind if kind is not None and rng.random() < 0.7 else rng.choice((U32, I32, F32, BOOL, STRING, ARRAY, U64))
    match kind:
        case 4:
            return Value(U32, rng.choice(_NUMBERS))
        case 5:
            return Value(I32, rng.choice((-1, -(2**31), 2**31 - 1, 0)))
        case 6:
            return Value(F32, rng.choice(_FLOATS))
        case 7:
            return Value(BOOL, rng.random() < 0.5)
        case 8:
            return Value(STRING, rng.choice(_STRINGS))
        case 9:
            return Value(ARRAY, rng.choice(([], [2], [2, 4], [0] * 3, [1] * 1000)))
    return Value(U64, rng.choice(_COUNTS))


def _lie_in_table(tensor: Tensor, rng: random.Random) -> str:
    match rng.randrange(6):
        case 0:
            tensor.offset = rng.choice((*_COUNTS, tensor.offset + 4, tensor.offset + 32))
            return f"{tensor.name} begins at {tensor.offset}"
        case 1:
            tensor.kind = rng.choice((1, 2, 3, 8, 12, 14, 24, 30, 39, 255, 2**32 - 1))
            return f"{tensor.name} has type {tensor.kind}"
        case 2:
            tensor.num_dims = rng.choice((0, 1, 3, 5, 100, 2**31, 2**32 - 1))
            return f"{tensor.name} says it has {tensor.num_dims} dimensions"
        case 3:
            tensor.name = rng.choice(("", "x", "token_embd.weight", "blk.99999999999.attn_q.weight", "a" * 70_000))
            return f"a tensor is named {tensor.name:.40}"
        case 4:
            tensor.dims = rng.choice(([], [0], [2**32, 2**32], tensor.dims[::-1], [*tensor.dims, 1], [1] * 64))
            return f"{tensor.name} has dimensions {tensor.dims}"
        case _:
            place = rng.randrange(len(tensor.dims) or 1)
            if tensor.dims:
                tensor.dims[place] = rng.choice((*_COUNTS, tensor.dims[place] * 2))
            return f"{tensor.name} has dimensions {tensor.dims}"


def _shown(value: Value) -> str:
    return f"{value.value!r:.60} of type {value.kind}"
