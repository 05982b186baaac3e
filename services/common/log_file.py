"""Rotation of the log file of a service that `scalellm up` started, to which its standard error is redirected."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from itertools import pairwise
from pathlib import Path

from scalellm.services.common.new_file import create_file

LOG_BYTES = 16 * 2**20
"""Approximate size at which a log is rotated."""

_NUM_OLD = 2
_STREAMS = (1, 2)


def log_files(log: Path) -> list[Path]:
    """Return the paths of a log's files, whether they exist or not, from the newest to the oldest."""
    return [log, *(log.with_name(f"{log.name}.{number}") for number in range(1, _NUM_OLD + 1))]


class BoundedLog(logging.Filter):
    """Rotates the log once it is large enough. A logging handler calls it as a filter before each line.

    The process's standard streams are redirected to the new file, so that it also gets tracebacks and the output of C++
    libraries. Other processes that write to the log (a service's children) switch with their next line; until then they
    write to the rotated file. So lines are lost only with the oldest file.

    Args:
        log: The file, in a folder of this user. Nothing is done if the process's standard error is another file.
        limit: Size in bytes at which the log is rotated.
    """

    def __init__(self, log: Path, limit: int = LOG_BYTES) -> None:
        super().__init__()
        self._log = log
        self._limit = limit
        self._is_ours = any(_is(_status(file), os.fstat(2)) for file in log_files(log))

    def filter(self, record: logging.LogRecord) -> bool:
        """Rotate the log if necessary. Returns True, so that every line is logged."""
        if self._is_ours:
            with contextlib.suppress(OSError):  # if the rotation fails, the line goes to the large file
                self._make_room()
        return True

    def _make_room(self) -> None:
        there, current = _status(self._log), os.fstat(2)
        if there is None:  # another process is rotating it
            return
        if not _is(there, current):
            self._move(current)
        elif current.st_size >= self._limit:
            self._put_aside(current)

    def _put_aside(self, current: os.stat_result) -> None:
        folder = os.open(self._log.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            if _is(_status(self._log), current):  # no other process has rotated it meanwhile
                for newer, older in reversed(list(pairwise(log_files(self._log)))):
                    with contextlib.suppress(FileNotFoundError):
                        newer.rename(older)
                os.close(create_file(self._log))
        finally:
            os.close(folder)
        self._move(current)

    def _move(self, current: os.stat_result) -> None:
        """Redirect the standard streams that write to the file `current` to the file that now has the log's name."""
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
