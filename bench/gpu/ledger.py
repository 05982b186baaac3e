"""The file that keeps what a run finds from the moment it is found."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, TextIO

from bench.gpu.part import Kind


def plain(value: Any, *, dry_run: bool) -> Any:
    """Return a value as JSON has it: no NaN, and of a dry run no figure, as these stand for nothing."""
    if isinstance(value, float) and (dry_run or value != value or abs(value) == float("inf")):
        return None
    return value


class Ledger:
    """Appends a line for each finding of any part; a line is on the disk before the next finding is looked at.

    Whoever is killed, this process included, loses nothing that was found before.
    """

    def __init__(self, path: Path, *, dry_run: bool) -> None:
        self.path = path
        self._dry_run = dry_run
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: TextIO = path.open("w")

    def take(self, part: str, kind: Kind, value: dict[str, Any]) -> None:
        """Append a finding."""
        values = {key: plain(item, dry_run=self._dry_run) for key, item in value.items()}
        self._file.write(json.dumps({"part": part, kind: values}) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """End it."""
        self._file.close()
