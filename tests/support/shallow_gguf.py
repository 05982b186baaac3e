"""A model with fewer layers than a published one, and all else of it: real weights, tokenizer and chat template."""

from __future__ import annotations

import re
import struct
from pathlib import Path

from scalellm.services.common.gguf_metadata import GgufMetadata
from scalellm.services.executor.gguf_file import GgufFile

_UINT32 = 4
_ALIGNMENT = 32
_FIXED_HEADER = struct.Struct("<4sIQQ")  # magic, version, number of tensors, number of metadata values


def write_shallow(source: Path, target: Path, num_layers: int) -> None:
    """Write the first layers of a GGUF model as a model of its own.

    Args:
        source: The published file, with tensors aligned to 32 bytes.
        target: The file to write.
        num_layers: Number of layers to keep.
    """
    data = source.read_bytes()
    metadata = GgufMetadata(source)
    assert metadata.typed("general.alignment", int) in (None, _ALIGNMENT)
    magic, version, _, num_values = _FIXED_HEADER.unpack_from(data)
    values_end = _FIXED_HEADER.size + sum(8 + len(key.encode()) + len(metadata.encoded(key)) for key in metadata)
    values = bytearray(data[_FIXED_HEADER.size : values_end])
    key = f"{metadata['general.architecture']}.block_count".encode()
    place = values.index(key) + len(key)
    kind, before = struct.unpack_from("<II", values, place)
    assert kind == _UINT32
    assert num_layers < before
    struct.pack_into("<I", values, place + 4, num_layers)

    table, bodies, offset = bytearray(), bytearray(), 0
    kept = 0
    with GgufFile(source) as file:
        for name, tensor in file.tensors.items():
            layer = re.match(r"blk\.(\d+)\.", name)
            if layer is not None and int(layer[1]) >= num_layers:
                continue
            kept += 1
            shape = tensor.shape[::-1]
            table += struct.pack("<Q", len(name)) + name.encode()
            table += struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, int(tensor.type), offset)
            body = data[tensor.offset : tensor.offset + tensor.num_bytes]
            bodies += body + bytes(-len(body) % _ALIGNMENT)
            offset = len(bodies)
    head = _FIXED_HEADER.pack(magic, version, kept, num_values) + values + table
    target.write_bytes(head + bytes(-len(head) % _ALIGNMENT) + bodies)
