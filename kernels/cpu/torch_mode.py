"""Dispatch modes, which intercept each op of torch that is called under them."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class TorchMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A dispatch mode that is invisible to torch's compiler."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Return False. Otherwise torch would import its compiler to skip this mode, which delays the first answer by
        1.7 s.
        """
        return False


class RowWatch(TorchMode):  # type: ignore[no-untyped-call]
    """Detects ops of torch whose result for a row may depend on the other rows, such as products and sums.

    Calls of the C++ library are not seen, and need not be, because its sums for a row do not depend on the other rows.

    Attributes:
        is_equal: True as long as no row's result could depend on the other rows, to the last bit.
    """

    def __init__(self) -> None:
        super().__init__()
        self.is_equal = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the op, and check whether its rows are independent."""
        if not (func.is_view or func.namespace == "c10d" or func._schema.name in _OF_ONE_ELEMENT):
            self.is_equal = False
        return func(*args, **(kwargs or {}))


NEW = ("aten::empty", "aten::empty_like", "aten::new_empty")
"""Ops that make uninitialised tensors."""

_OF_ONE_ELEMENT = frozenset(
    {
        *NEW,
        *(f"aten::{name}" for name in ("clone", "copy_", "cat", "stack", "scalar_tensor", "where")),
        *(f"aten::{name}" for name in ("__and__", "ge", "lt", "sub", "add", "add_")),
    }
)
"""Ops that copy elements, or compute each element from a few inputs by one operation that is exact or rounded once."""
