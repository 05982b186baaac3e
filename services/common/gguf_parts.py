"""GGUF models that are split into several files: `name-00001-of-00003.gguf`, as llama.cpp writes and reads them.

The first file has the metadata of the whole model, each has its own part of the tensors.
"""

from __future__ import annotations

import re
from pathlib import Path

from scalellm.services.common.gguf_metadata import GgufError

_PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)


def split_name(name: str) -> tuple[str, int, int] | None:
    """Parse the name of a part into the model's name, the part's number from 1 on, and the number of parts; None if it
    is none.
    """
    found = _PART.fullmatch(name)
    return (found["stem"], int(found["number"]), int(found["count"])) if found else None


def gguf_models(folder: Path) -> list[Path]:
    """Return the GGUF models in a folder, each by its only or first file."""
    return [path for path in sorted(folder.glob("*.gguf")) if (split_name(path.name) or ("", 1, 1))[1] == 1]


def gguf_parts(path: Path) -> list[Path]:
    """Return the files of a model in their order, given its only or first file. Raises GgufError."""
    split = split_name(path.name)
    if split is None:
        return [path]
    stem, number, count = split
    parts = [path.with_name(f"{stem}-{part:05}-of-{count:05}.gguf") for part in range(1, count + 1)]
    if number != 1:
        raise GgufError(f"{path} is part {number} of a split model; give its first file, {parts[0].name}")
    if missing := [part.name for part in parts if not part.is_file()]:
        raise GgufError(f"{path}: {len(missing)} of {count} parts are missing: {', '.join(missing[:3])}")
    return parts
