"""The model's properties that must be equal for a request to move from one server to another."""

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
        """Return the model of a Welcome."""
        return cls(welcome.model, welcome.tokenizer_sha256, welcome.vocab_size)

    def differences(self, other: ModelIdentity) -> str:
        """Return the names of the properties that differ, such as `model and vocab_size`."""
        return " and ".join(name for name, a, b in zip(self._fields, self, other, strict=True) if a != b)
