"""A model's way of writing reasoning and function calls: one description constrains its output and parses it."""

from scalellm.services.tokenizer.dialect.dialect import (
    CallFormat,
    Channels,
    Dialect,
    JsonArguments,
    Marks,
    PythonArguments,
    TaggedArguments,
)
from scalellm.services.tokenizer.dialect.known import dialect_of
from scalellm.services.tokenizer.dialect.parts import Part, PartKind

__all__ = [
    "CallFormat",
    "Channels",
    "Dialect",
    "JsonArguments",
    "Marks",
    "Part",
    "PartKind",
    "PythonArguments",
    "TaggedArguments",
    "dialect_of",
]
