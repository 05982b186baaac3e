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
    """A configured file cannot be used. The message names the option, the file and the reason."""


class Reloaded(Generic[T]):
    """The contents of some files, which are read again when one of them changes.

    An invalid change is logged once, and the last valid value is kept, so that, for instance, a partly copied
    certificate does not end a running service.

    Args:
        files: Files to watch.
        load: Reads and checks them. Raises ConfigFileError.

    Attributes:
        value: The last valid contents.
        failing_since: Monotonic seconds since which the files have been invalid, so that `value` is old; None: they are
            valid.
    """

    def __init__(self, files: Sequence[Path], load: Callable[[], T]) -> None:
        self._files = tuple(files)
        self._load = load
        self._stamp = self._read_stamp()
        self.value = load()
        self.failing_since: float | None = None

    def refresh(self) -> bool:
        """Read the files again if they have changed. Returns whether there is a new value."""
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
        status = path.stat()  # follows links, because mounted secrets are replaced by changing a link
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def read_file(path: Path, option: str) -> bytes:
    """Read a file that `option` names. Raises ConfigFileError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigFileError(f"{option}: cannot read {path}: {error.strerror}") from None
