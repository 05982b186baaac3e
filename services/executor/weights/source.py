"""What the loader asks of a checkpoint, whatever its format."""

from collections.abc import Callable, Mapping
from typing import Protocol

from services.executor.models.layers import WeightSlot


class WeightSource(Protocol):
    """An open checkpoint. Tensors go by their Hugging Face names; a name without an equivalent stays as it is."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor in the checkpoint."""

    def native_name(self, name: str) -> str:
        """Return the name by which the checkpoint itself knows a tensor, for error messages."""

    def read(self, slot: WeightSlot, on_bytes: Callable[[int], None]) -> None:
        """Fill a slot, converting to its dtype; `on_bytes` gets the bytes written since its last call."""
