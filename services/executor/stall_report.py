"""Stacks of all threads of a process that hangs, even in native code."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import os
import signal
import tempfile
from pathlib import Path
from typing import IO

_SIGNAL = signal.SIGUSR1
_PATIENCE = 3.0
_POLL = 0.1
_MOST_BYTES = 1 << 16

_STATES = {
    "R": "running",
    "S": "waiting",
    "D": "waiting in the kernel, not to be interrupted",
    "T": "stopped by a signal",
    "t": "stopped by a debugger",
    "Z": "ended",
}


class StackFile:
    """The file to which a child process writes its threads' stacks, when it is asked to and when it dies of a fault.

    They are written by a signal handler in C, which needs neither the interpreter lock nor a main thread that runs
    Python, so they are also obtained from a process that hangs within a library call.
    """

    def __init__(self) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close

    def fileno(self) -> int:
        """The file descriptor that the child inherits, and gives to `write_stacks_to`."""
        return self._file.fileno()

    def close(self) -> None:
        """Close and thereby delete the file."""
        self._file.close()

    def read(self) -> str:
        """Return everything written so far: Python's frames of each thread, the innermost first."""
        return os.pread(self.fileno(), _MOST_BYTES, 0).decode(errors="replace").strip()

    async def ask(self, pid: int) -> str:
        """Return the stacks of the child's threads and their states in the kernel, or the reason why there are none."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, _SIGNAL)
        size = -1
        for _ in range(round(_PATIENCE / _POLL)):
            await asyncio.sleep(_POLL)
            before, size = size, os.fstat(self.fileno()).st_size
            if 0 < size == before:
                break
        states = _thread_states(pid)
        if any(state.endswith(_STATES["T"]) for state in states):
            stacks = "its stacks are not known: it was stopped by a signal, such as SIGSTOP"
        else:
            stacks = self.read() or "its stacks are not known: it did not write them when it was asked to"
        return "\n".join((*states, stacks))


def write_stacks_to(descriptor: int) -> None:
    """Make this child process write the stacks of all threads to a descriptor when asked to, and on fatal signals."""
    faulthandler.register(_SIGNAL, file=descriptor, all_threads=True)
    faulthandler.enable(file=descriptor, all_threads=True)


def _thread_states(pid: int) -> list[str]:
    """Return one line per thread with its state in the kernel; empty if the kernel does not report it."""
    lines = []
    for task in sorted(Path(f"/proc/{pid}/task").glob("*"), key=lambda path: int(path.name)):
        try:
            # The name stands in parentheses and may hold any character.
            name, _, rest = task.joinpath("stat").read_text().partition("(")[2].rpartition(")")
            place = task.joinpath("wchan").read_text().strip("0")
        except OSError:  # the thread has just ended
            continue
        state = _STATES.get(rest.split()[0], rest.split()[0])
        lines.append(f"thread {task.name} ({name}){f' in {place}' if place else ''}: {state}")
    return lines
