"""How a model writes reasoning and function calls: one description gives what it may write and what was written."""

from scalellm.services.tokenizer.dialect.dialect import CallFormat, Dialect, JsonArguments, Marks, TaggedArguments
from scalellm.services.tokenizer.dialect.known import dialect_of
from scalellm.services.tokenizer.dialect.parts import Part, PartKind

__all__ = ["CallFormat", "Dialect", "JsonArguments", "Marks", "Part", "PartKind", "TaggedArguments", "dialect_of"]
