"""The interface of a checkpoint for the loader, whatever its format."""

from collections.abc import Callable, Mapping
from typing import Protocol

import torch

from scalellm.services.executor.models.weight_slot import WeightSlot


class WeightSource(Protocol):
    """An open checkpoint. Tensors go by their Hugging Face names; a name without an equivalent stays as it is."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor in the checkpoint."""

    def native_name(self, name: str) -> str:
        """Return the name by which the checkpoint itself knows a tensor, for error messages."""

    def wrong_dtype(self, name: str, slot: WeightSlot) -> str | None:
        """Return the dtypes that a tensor has and should have for a slot, in words; None when it has one of them."""

    def read(self, name: str, slot: WeightSlot, device: torch.device, on_bytes: Callable[[int], None]) -> None:
        """Fill a slot with a tensor, or its window of it, converting to its dtype.

        Conversions that cost something happen on `device`.
        `on_bytes` gets the bytes of the model that were filled since its last call.
        """
