"""Bounds the log of a service that `scalellm up` started: the file that its standard error goes to."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from itertools import pairwise
from pathlib import Path

from scalellm.services.common.new_file import create_file

LOG_BYTES = 16 * 2**20
"""Size, about, at which a log is put aside."""

_NUM_OLD = 2
_STREAMS = (1, 2)


def log_files(log: Path) -> list[Path]:
    """The files of a log, there or not, from the newest to the oldest."""
    return [log, *(log.with_name(f"{log.name}.{number}") for number in range(1, _NUM_OLD + 1))]


class BoundedLog(logging.Filter):
    """Puts the log aside once it is large enough, and goes on in a new file; a handler asks it before each line.

    The process's standard streams move to the new file, so that tracebacks and what C++ libraries print are in it as
    well. The other processes that write to the log (a service's children) move with their next line, and what they
    write until then is in the file that was put aside: no line is lost but with the oldest file.

    Args:
        log: The file, in a folder of this user's own. A process whose standard error is another one is left alone.
        limit: Bytes.
    """

    def __init__(self, log: Path, limit: int = LOG_BYTES) -> None:
        super().__init__()
        self._log = log
        self._limit = limit
        self._is_ours = any(_is(_status(file), os.fstat(2)) for file in log_files(log))

    def filter(self, record: logging.LogRecord) -> bool:
        """Let every line pass, into a file that has room for it."""
        if self._is_ours:
            with contextlib.suppress(OSError):  # a line in a large file is better than none
                self._make_room()
        return True

    def _make_room(self) -> None:
        there, current = _status(self._log), os.fstat(2)
        if there is None:  # it is being put aside
            return
        if not _is(there, current):
            self._move(current)
        elif current.st_size >= self._limit:
            self._put_aside(current)

    def _put_aside(self, current: os.stat_result) -> None:
        folder = os.open(self._log.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            if _is(_status(self._log), current):  # nobody else was faster
                for newer, older in reversed(list(pairwise(log_files(self._log)))):
                    with contextlib.suppress(FileNotFoundError):
                        newer.rename(older)
                os.close(create_file(self._log))
        finally:
            os.close(folder)
        self._move(current)

    def _move(self, current: os.stat_result) -> None:
        """Let the streams that go to the file `current` go to the one that has the log's name now."""
        descriptor = os.open(self._log, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            for stream in _STREAMS:
                if _is(os.fstat(stream), current):
                    os.dup2(descriptor, stream)
        finally:
            os.close(descriptor)


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.lstat()
    except OSError:
        return None


def _is(one: os.stat_result | None, other: os.stat_result) -> bool:
    return one is not None and os.path.samestat(one, other)
