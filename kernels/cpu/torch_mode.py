"""Modes that see each op of torch that the work under them uses."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class TorchMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A dispatch mode that torch's compiler knows nothing of."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: for its compiler to skip this, torch imports it, which takes 1.7 s of the first answer."""
        return False


class RowWatch(TorchMode):  # type: ignore[no-untyped-call]
    """Notes if torch computes something that may depend on the rows beside a row, such as a product or a sum.

    What the C++ library computes is not seen: it adds up each row in one order, whatever is beside it.

    Attributes:
        is_equal: True as long as each row was computed as if it were alone, to the last bit.
    """

    def __init__(self) -> None:
        super().__init__()
        self.is_equal = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Let everything pass, and take note of it."""
        if not (func.is_view or func.namespace == "c10d" or func._schema.name in _OF_ONE_ELEMENT):
            self.is_equal = False
        return func(*args, **(kwargs or {}))


NEW = ("aten::empty", "aten::empty_like", "aten::new_empty")
"""Ops that make tensors and fill in nothing."""

_OF_ONE_ELEMENT = frozenset(
    {
        *NEW,
        *(f"aten::{name}" for name in ("clone", "copy_", "cat", "stack", "scalar_tensor", "where")),
        *(f"aten::{name}" for name in ("__and__", "ge", "lt", "sub", "add", "add_")),
    }
)
"""Ops that copy elements, or compute each of its own few inputs by one operation, which is exact or rounded once."""
