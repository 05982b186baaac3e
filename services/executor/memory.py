"""The memory that this process may still take."""

from __future__ import annotations

from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")


# Files of a cgroup, version 2 and 1: limit, use, statistics, and what those call the page cache of files.
_VERSIONS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)


def free_memory(cgroup: Path = _CGROUP) -> int:
    """Return the bytes that can be allocated: the machine's available memory, or less if a container's limit is lower.

    Args:
        cgroup: The cgroup directory of this process, as a container sees it.
    """
    available: int = psutil.virtual_memory().available
    for limit_file, used_file, statistics, reclaimable in _VERSIONS:
        limit, used = _read(cgroup / limit_file), _read(cgroup / used_file)
        if limit is not None and used is not None:
            return max(0, min(available, limit - used + _reclaimable(cgroup / statistics, reclaimable)))
    return available


def _read(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None  # "max" means no limit


def _reclaimable(statistics: Path, name: str) -> int:
    """Return the page cache of files, such as mapped weights, which counts as used but is reclaimed under pressure."""
    try:
        fields = dict(line.split() for line in statistics.read_text().splitlines())
    except OSError:
        return 0
    return int(fields.get(name, 0))
