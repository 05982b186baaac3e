"""Files that may change while a service runs: certificates, keys, tokens."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from scalellm.services.common.lifecycle import StartError

_log = logging.getLogger(__name__)

T = TypeVar("T")


class ConfigFileError(StartError):
    """A file that the service was told to use cannot be used; the message names the option, the file and why."""


class Reloaded(Generic[T]):
    """The contents of some files, read again when one of them is changed or replaced.

    A change with a mistake in it is logged once and leaves the value as it was: a service that runs is not ended by a
    certificate that is half copied.

    Args:
        files: Files to watch.
        load: Reads and checks them; raises ConfigFileError.

    Attributes:
        value: The contents that were read last.
        failing_since: Monotonic seconds since when the files cannot be used, so that `value` is old; None: it is not.
    """

    def __init__(self, files: Sequence[Path], load: Callable[[], T]) -> None:
        self._files = tuple(files)
        self._load = load
        self._stamp = self._read_stamp()
        self.value = load()
        self.failing_since: float | None = None

    def refresh(self) -> bool:
        """Look at the files. Whether there is a new value."""
        stamp = self._read_stamp()
        if stamp == self._stamp and self.failing_since is None:
            return False
        is_change = stamp != self._stamp
        self._stamp = stamp
        names = ", ".join(map(str, self._files))
        try:
            self.value = self._load()
        except ConfigFileError as error:
            if is_change:
                _log.error("%s changed, but what was read before stays in use: %s", names, error)
            if self.failing_since is None:
                self.failing_since = time.monotonic()
            return False
        self.failing_since = None
        _log.info("read %s again", names)
        return True

    def _read_stamp(self) -> tuple[tuple[int, int, int] | None, ...]:
        return tuple(map(_stamp_of, self._files))


def _stamp_of(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()  # follows links, which is how mounted secrets are replaced
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def read_file(path: Path, option: str) -> bytes:
    """The bytes of a file that `option` names. Raises ConfigFileError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigFileError(f"{option}: cannot read {path}: {error.strerror}") from None
