"""Creation of files at known paths, at which another user may have placed a link."""

from __future__ import annotations

import os
from pathlib import Path


def create_file(path: Path, mode: int = 0o600, flags: int = 0) -> int:
    """Create a new file, replacing an existing one, and return its descriptor for writing. Raises OSError.

    An existing link is removed and not followed. A file that another process creates meanwhile is not opened.
    """
    path.unlink(missing_ok=True)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC | flags, mode)


def write_new(path: Path, text: str, mode: int = 0o600) -> None:
    """Write a new file with a text, replacing an existing one. Raises OSError."""
    with open(create_file(path, mode), "w", encoding="utf-8") as stream:
        stream.write(text)
