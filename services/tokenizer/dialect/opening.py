"""The part of an answer with which it begins."""

from __future__ import annotations

import enum

from scalellm.services.tokenizer.dialect.dialect import Dialect


class Opening(enum.Enum):
    """The part in which an answer begins, as the end of its prompt tells."""

    ANYWHERE = enum.auto()
    """With reasoning, or without."""
    IN_REASONING = enum.auto()
    """The prompt has the mark of the beginning."""
    BEHIND_REASONING = enum.auto()
    """The prompt has the mark of the end, or text of the answer."""

    @classmethod
    def of(cls, prompt: str, dialect: Dialect) -> Opening:
        """Return where an answer begins behind a prompt, of which the last characters are enough."""
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
