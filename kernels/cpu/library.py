"""The C++ forms as a shared object, which is either shipped with the package for this CPU, or built once by the
machine's compiler and kept in the user's cache directory; see `kernels.cpu.building`. In both cases it is used only
after its products were compared with plain sums on this machine.

The sources include no headers of torch or Python, and are called through ctypes, which releases the interpreter lock.
So a build needs only a compiler, takes seconds, and does not depend on the version of torch.
"""

import ctypes
import functools
import logging
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

import torch

from scalellm.kernels.cpu.building import FaultyLibraryError, candidates, check, cpu_features, library_path

# Numbers of element types in C++, `Code` in vec.h.
CODES: Mapping[torch.dtype, int] = MappingProxyType(
    {torch.float32: 0, torch.bfloat16: 1, torch.float8_e4m3fn: 2, torch.float16: 3, torch.int8: 4}
)

TILE = 32  # columns of a product whose weights lie together in memory; `kTile` in tile.h
LANES = 16  # of the widest vectors: rows whose length is a multiple need no special case on any machine

# Every exported function and its arguments, without the number of threads, an int64, which is the last of each: p a
# pointer, i an int64, f a double. The result is an int64: -1, or the index of the row that is at fault. `NAME_recorded`
# is the same function with its arguments in memory, eight bytes each.
FUNCTIONS: Mapping[str, str] = MappingProxyType(
    {
        "finite_rows": "ippiii",
        "fused_add_rms_norm": "ippppiiiiiif",
        "gated_activation": "iippiiii",
        "gather_packed_rows": "iipppppiiiif",
        "gather_rows": "pppiii",
        "gather_tiled_rows": "ipppiiif",
        "gemm_dense": "ipppipppiii",
        "gemm_wna16": "iipppippppiiii",
        "mask_logits": "ppiiii",
        "paged_attention_decode": "iippppppiiiiiiiiiiifff",
        "qk_norm_rope_and_cache": "iipppppppppiiiiiiiiiifff",
        "sample": "ppppppppppppiiiii",
        "sort_by_expert": "ppppiii",
        "sum_of_experts": "ippppiii",
        "topk_softmax": "pppiiii",
        "unified_attention": "iippppppiiiiiiiiiiifffppi",
    }
)
TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_double}

_logger = logging.getLogger(__name__)

Call = tuple[str, tuple[int | float | None, ...]]


class _Notes(threading.local):
    """The recorded calls of a thread; None while it does not record."""

    calls: list[Call] | None = None
    makes_calls = True


class CpuLibrary:
    """The functions of a shared object, by name.

    `level` names the instructions that it is compiled for, and `passed_over` contains why stronger ones are not used.

    Raises:
        OSError: it cannot be loaded.
        AttributeError: it lacks a function.
    """

    def __init__(self, path: Path, level: str, passed_over: Mapping[str, str] = MappingProxyType({})) -> None:
        self.level = level
        self.passed_over = passed_over
        dll = ctypes.CDLL(str(path))
        for name, arguments in FUNCTIONS.items():
            function = getattr(dll, name)
            function.argtypes = [*(TYPES[kind] for kind in arguments), ctypes.c_int64]
            function.restype = ctypes.c_int64
            getattr(dll, f"{name}_recorded")
        if not dll.prepare():
            raise OSError(f"the operating system does not keep the state that {level} instructions need")
        self._replay = dll.replay
        self._replay.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
        self._replay.restype = ctypes.c_int64
        self._dll = dll
        self._notes = _Notes()

    def call(self, name: str, *args: int | float | None) -> int:
        """Call a function with these arguments, pointers as `data_ptr` returns them, and torch's number of threads.
        Returns -1, or the index of the row at fault.
        """
        if self._notes.calls is not None:
            self._notes.calls.append((name, args))
            if not self._notes.makes_calls:
                return -1
        result: int = getattr(self._dll, name)(*args, torch.get_num_threads())
        return result

    @contextmanager
    def noted(self, *, makes_calls: bool = True) -> Iterator[list[Call]]:
        """Record all calls of this thread within the context. Without `makes_calls` they are not made, and
        return -1.
        """
        calls = self._notes.calls = []
        self._notes.makes_calls = makes_calls
        try:
            yield calls
        finally:
            self._notes.calls = None

    def recorded(self, name: str) -> int:
        """Return the address of the form of a function that takes its arguments from memory."""
        address = ctypes.cast(getattr(self._dll, f"{name}_recorded"), ctypes.c_void_p).value
        assert address is not None
        return address

    def replay(self, calls: int, count: int) -> int:
        """Make `count` calls, each described at `calls` by the address of a function and that of its arguments.

        Returns -1, or the index of the call that found an invalid input.
        """
        result: int = self._replay(calls, count, torch.get_num_threads())
        return result


def default_build_dir() -> Path:
    """Return the default folder of compiled forms."""
    return Path.home() / ".cache" / "scalellm" / "kernels"


@functools.cache
def load_library(build_dir: Path) -> CpuLibrary | None:
    """Load the library for this machine and these sources, building it in `build_dir` if necessary.

    The strongest level of instructions is used that the CPU supports and whose check succeeds; a warning names each
    level that is passed over. Returns None, after one line of warning, if no level is available, because there is no
    compiler or it fails. Several processes may call it at the same time.
    """
    passed_over: dict[str, str] = {}
    for level in candidates(cpu_features()):
        try:
            path = library_path(level, build_dir)
            check(path)
            found = CpuLibrary(path, level.name, passed_over)
        except subprocess.CalledProcessError as error:
            reason = f"{error.cmd[0]} failed: {' '.join(error.stderr.split())[:300]}"
        except (OSError, AttributeError, subprocess.SubprocessError, FaultyLibraryError) as error:
            reason = str(error)
        else:
            for name, why in passed_over.items():
                _logger.warning("kernels in C++ use %s instructions and not %s: %s", level.name, name, why)
            return found
        passed_over[level.name] = reason
    _logger.warning("kernels in C++ are not available, plain torch is used instead: %s", reason)
    return None
