"""Values that tests share and that cost seconds to make."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

_Value = TypeVar("_Value")


class OnDemand(dict[str, _Value]):
    """Values by name, each made when a test first asks for it, and kept."""

    def __init__(self, make: Callable[[str], _Value]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, name: str) -> _Value:
        value = self[name] = self._make(name)
        return value
