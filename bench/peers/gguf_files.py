"""Parts of writing a GGUF file."""

from __future__ import annotations

from collections.abc import Iterable

import gguf


def add_fields(writer: gguf.GGUFWriter, fields: Iterable[gguf.ReaderField]) -> None:
    """Add fields of another file as they are."""
    for field in fields:
        outer = field.types[0]
        inner = field.types[-1] if outer == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), outer, sub_type=inner)


def write_file(writer: gguf.GGUFWriter) -> None:
    """Write the file with all that was added, and close it."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
