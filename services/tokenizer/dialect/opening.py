"""The part of an answer with which it begins."""

from __future__ import annotations

import enum

from scalellm.services.tokenizer.dialect.dialect import Dialect


class Opening(enum.Enum):
    """The part in which an answer begins, by the end of its prompt."""

    ANYWHERE = enum.auto()
    """The answer may begin with reasoning or without."""
    IN_REASONING = enum.auto()
    """The answer begins in reasoning, since the prompt ends with the mark that begins it."""
    BEHIND_REASONING = enum.auto()
    """The answer begins after the reasoning, since the prompt ends with the mark that ends it, or with answer text."""

    @classmethod
    def of(cls, prompt: str, dialect: Dialect) -> Opening:
        """Return where the answer to a prompt begins. The last characters of the prompt are enough."""
        prompt = prompt.rstrip()
        if (channels := dialect.channels) is not None:
            if prompt.endswith(channels.header(channels.reasoning)):
                return cls.IN_REASONING
            return cls.ANYWHERE if prompt.endswith(channels.begin) else cls.BEHIND_REASONING
        if dialect.reasoning is None:
            return cls.BEHIND_REASONING
        if prompt.endswith(dialect.reasoning.begin):
            return cls.IN_REASONING
        return cls.BEHIND_REASONING if prompt.endswith(dialect.reasoning.end) else cls.ANYWHERE
