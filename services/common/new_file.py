"""New files at known paths, which somebody else may have put a link at."""

from __future__ import annotations

import os
from pathlib import Path


def create_file(path: Path, mode: int = 0o600, flags: int = 0) -> int:
    """Make a new file in place of what has its name, and return its descriptor, for writing. Raises OSError.

    A link that stands there is removed and not followed; what is put there meanwhile is neither opened nor changed.
    """
    path.unlink(missing_ok=True)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC | flags, mode)


def write_new(path: Path, text: str, mode: int = 0o600) -> None:
    """Write a whole new file in place of what has its name. Raises OSError."""
    with open(create_file(path, mode), "w", encoding="utf-8") as stream:
        stream.write(text)
