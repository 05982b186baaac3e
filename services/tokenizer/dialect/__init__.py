"""A model's way of writing reasoning and function calls: one description constrains its output and parses it."""

from scalellm.services.tokenizer.dialect.dialect import CallFormat, Dialect, JsonArguments, Marks, TaggedArguments
from scalellm.services.tokenizer.dialect.known import dialect_of
from scalellm.services.tokenizer.dialect.parts import Part, PartKind

__all__ = ["CallFormat", "Dialect", "JsonArguments", "Marks", "Part", "PartKind", "TaggedArguments", "dialect_of"]
