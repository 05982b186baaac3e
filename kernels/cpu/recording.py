"""Recording of a step's calls, and their replay as one call, as a GPU replays a captured graph.

A decode step of a small model consists of some hundred calls of a few microseconds each, and calling them from Python
takes as long as they do. In a replay, the threads of `parallel.h` also stay awake between calls.
"""

import ctypes
import itertools
import struct
import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from scalellm.kernels.cpu.library import FUNCTIONS, Call, CpuLibrary
from scalellm.kernels.cpu.torch_mode import NEW, TorchMode

_Result = TypeVar("_Result")


class NotRecordableError(Exception):
    """The recorded work computes something outside the library."""


class Recorder:
    """Records steps. They share the memory of their intermediate results, so only one may run at a time."""

    def __init__(self, library: CpuLibrary) -> None:
        self._library = library
        self._memory = _Memory()

    def record(self, run: Callable[[], _Result], *, makes_calls: bool = True) -> "Recording[_Result]":
        """Run `run` and return a recording of its calls.

        Args:
            run: The work.
            makes_calls: False: calls are recorded without being made, so that nothing is computed and inputs are not
                read.

        Raises:
            NotRecordableError: `run` uses an op of torch that computes something.
        """
        with self._memory, self._library.noted(makes_calls=makes_calls) as calls:
            result = run()
        return Recording(self._library, calls, result)


class Recording(Generic[_Result]):
    """Recorded calls of a library, with the addresses of their arguments. `result` is one or more tensors that they
    write.

    A replay reads the current contents of inputs and weights at the recorded addresses, so the caller must keep these
    alive. The result is valid until the recorder's next step.
    """

    def __init__(self, library: CpuLibrary, calls: list[Call], result: _Result) -> None:
        self.result = result
        self._library = library
        self._names = [name for name, _ in calls]
        arguments = [_packed(FUNCTIONS[name], args) for name, args in calls]
        self._arguments = torch.frombuffer(bytearray(b"".join(arguments)), dtype=torch.int64)
        starts = itertools.accumulate(map(len, arguments), initial=self._arguments.data_ptr())
        self._calls = torch.tensor([[library.recorded(n), at] for n, at in zip(self._names, starts, strict=False)])
        self._place = self._calls.data_ptr(), len(self._calls)

    def replay(self) -> _Result:
        """Make the recorded calls and return the result."""
        at = self._library.replay(*self._place)
        if at >= 0:
            raise ValueError(f"{self._names[at]}: a recorded call found fault with its inputs")
        return self.result


class _Memory(TorchMode):  # type: ignore[no-untyped-call]
    """Gives new tensors memory that is never freed, but reused for the next tensor of about the same size.

    Otherwise temporary tensors of a run would be recorded at addresses that are later used for something else.
    """

    def __init__(self) -> None:
        super().__init__()
        self._unused: dict[int, list[Tensor]] = defaultdict(list)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Allow views, allocate new tensors, and refuse all other ops."""
        if not func.is_view and func._schema.name not in NEW:
            raise NotRecordableError(str(func))
        made = func(*args, **(kwargs or {}))
        return made if func.is_view else self._lend(made.nbytes).view(made.dtype).view(made.shape)

    def _lend(self, num_bytes: int) -> Tensor:
        size = 1 << (num_bytes - 1).bit_length()  # rounded up, so that steps with other numbers of rows can reuse it
        unused = self._unused[size]
        block = unused.pop() if unused else torch.empty(size, dtype=torch.uint8)
        # The storage of the tensor keeps this array, and nothing else does.
        lent = (ctypes.c_uint8 * size).from_address(block.data_ptr())
        weakref.finalize(lent, unused.append, block).atexit = False
        return torch.frombuffer(lent, dtype=torch.uint8)[:num_bytes]


def _packed(kinds: str, args: tuple[int | float | None, ...]) -> bytes:
    """Pack arguments into eight bytes each. None, a missing pointer, becomes 0."""
    formats = kinds.replace("p", "q").replace("i", "q").replace("f", "d")
    return struct.pack(f"={formats}", *(arg or 0 for arg in args))
