"""Copies of a GGUF file's fields."""

from __future__ import annotations

from collections.abc import Iterable

import gguf


def add_fields(writer: gguf.GGUFWriter, fields: Iterable[gguf.ReaderField]) -> None:
    """Add fields of another file as they are."""
    for field in fields:
        outer = field.types[0]
        inner = field.types[-1] if outer == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), outer, sub_type=inner)
