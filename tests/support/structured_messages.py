"""Messages of any type as bytes: every field known, and with what nobody would write in it.

Nearly all of a message is plausible and short, so that it comes as far as the odd parts matter.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable

from google.protobuf.descriptor import Descriptor, FieldDescriptor

MAX_DEPTH = 6
MAX_FIELD_BYTES = 2**16
"""Beyond which entries of a field are not repeated: lists of lists would have any size."""
SIZES = (0, 1, 2, 3, 40, 2000)
WILDNESS = (0.0, 0.02, 0.1, 0.5, 1.0)

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_INTEGERS = (0, 1, 2, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1)
_FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-45, 1e-300, 1e38, 1e308, float("inf"), float("-inf"), float("nan"))
_TEXTS = (
    *(b"", b"Hi", b"user", b"\0", b"\xff\xfe", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xc0\x80", b"\xe2\x80\xae"),
    *(
        b"<|im_start|>",
        b"<|im_end|>",
        b"{{ 1 }}",
        b"../../etc/passwd",
        b"a" * 70_000,
        "\N{GRINNING FACE}".encode() * 999,
    ),
    *(b"00-" + b"f" * 32 + b"-" + b"f" * 16 + b"-01", b"WzAsICJhIl0=", b"\x1b[2J", b"\n" * 500, b" " * 5000),
)
_NAMES = ("Hi", "user", "assistant", "a", "b", "hello big wide world")


def structured(descriptor: Descriptor, rng: random.Random) -> bytes:
    """Return the bytes of a message of this type; equal generators give equal ones."""
    return _message(descriptor, rng, rng.choice(WILDNESS), 0)


def _message(descriptor: Descriptor, rng: random.Random, wildness: float, depth: int) -> bytes:
    density = rng.choice((0.15, 0.4, 0.9))
    parts = []
    for field in descriptor.fields:
        if rng.random() < density:
            # A field that is no list may come twice all the same, and so may two of a oneof: the last one counts.
            is_many = field.is_repeated or rng.random() < wildness / 4
            count = rng.choice(SIZES if is_many and rng.random() < wildness else (1, 1, 2)) if is_many else 1
            parts.extend(_field(field, rng, wildness, depth, count))
    if rng.random() < wildness:
        parts.append(_tag(rng.choice((15, 1000, 19_000, 2**29 - 1)), _BYTES) + _sized(b"unknown"))
    rng.shuffle(parts)
    data = b"".join(parts)
    if rng.random() < wildness / 10:
        data = data[: rng.randrange(len(data) + 1)]
    return data


def _field(field: FieldDescriptor, rng: random.Random, wildness: float, depth: int, count: int) -> list[bytes]:
    if rng.random() < wildness / 20:  # of another type than the field's
        return [_tag(field.number, _VARINT) + _varint(rng.choice(_INTEGERS))]
    if field.type == FieldDescriptor.TYPE_MESSAGE:
        if depth >= MAX_DEPTH:
            return []
        # Many are equal: what counts is how many there are.
        return _many(field, _message(field.message_type, rng, wildness, depth + 1), count)
    if field.type in (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES):
        return _many(field, _text(rng, wildness), count)
    wire, encode = _SCALARS.get(field.type, (_VARINT, _integer))
    values = [encode(rng, wildness) for _ in range(count)]
    if field.is_repeated and rng.random() < 0.8:
        return [_tag(field.number, _BYTES) + _sized(b"".join(values))]
    return [_tag(field.number, wire) + value for value in values]


def _many(field: FieldDescriptor, body: bytes, count: int) -> list[bytes]:
    return [_tag(field.number, _BYTES) + _sized(body)] * max(1, min(count, MAX_FIELD_BYTES // (len(body) + 2)))


def _text(rng: random.Random, wildness: float) -> bytes:
    return rng.choice(_TEXTS) if rng.random() < wildness else rng.choice(_NAMES).encode()


def _integer(rng: random.Random, wildness: float) -> bytes:
    return _varint(rng.choice(_INTEGERS) if rng.random() < wildness else rng.randrange(5))


def _float(format: str) -> Callable[[random.Random, float], bytes]:
    def encode(rng: random.Random, wildness: float) -> bytes:
        value = rng.choice(_FLOATS) if rng.random() < wildness else rng.choice((0.0, 0.5, 1.0))
        # A number that the smaller type lacks becomes infinite, as compilers convert it.
        return struct.pack(format, value if format == "<d" or abs(value) < 3e38 else float("inf"))

    return encode


def _fixed(format: str, bits: int) -> Callable[[random.Random, float], bytes]:
    def encode(rng: random.Random, wildness: float) -> bytes:
        return struct.pack(format, (rng.choice(_INTEGERS) if rng.random() < wildness else 1) % 2**bits)

    return encode


_SCALARS: dict[int, tuple[int, Callable[[random.Random, float], bytes]]] = {
    FieldDescriptor.TYPE_FLOAT: (_FIXED32, _float("<f")),
    FieldDescriptor.TYPE_DOUBLE: (_FIXED64, _float("<d")),
    FieldDescriptor.TYPE_FIXED32: (_FIXED32, _fixed("<I", 32)),
    FieldDescriptor.TYPE_FIXED64: (_FIXED64, _fixed("<Q", 64)),
    FieldDescriptor.TYPE_SFIXED32: (_FIXED32, _fixed("<I", 32)),
    FieldDescriptor.TYPE_SFIXED64: (_FIXED64, _fixed("<Q", 64)),
}


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes((*out, value))


def _tag(number: int, wire: int) -> bytes:
    return _varint(number << 3 | wire)


def _sized(data: bytes) -> bytes:
    return _varint(len(data)) + data
