"""The properties that servers of one kind must have in common for a request to move between them."""

from __future__ import annotations

from typing import NamedTuple

from scalellm.v1 import link_pb2


class ModelIdentity(NamedTuple):
    """The model of a Welcome."""

    model: str
    tokenizer_sha256: bytes
    vocab_size: int

    @classmethod
    def of(cls, welcome: link_pb2.Welcome) -> ModelIdentity:
        """The model that a Welcome speaks of."""
        return cls(welcome.model, welcome.tokenizer_sha256, welcome.vocab_size)

    def differences(self, other: ModelIdentity) -> str:
        """The names of what differs, such as `model and vocab_size`."""
        return " and ".join(name for name, a, b in zip(self._fields, self, other, strict=True) if a != b)
