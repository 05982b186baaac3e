"""Triton's cache of compiled kernels, saved in files that can be carried to the next run on a bare machine.

Compiling is most of a first run's time. A piece is a tar file of entries of the cache; pieces are few and small because
what brings results back from a borrowed machine limits both.
"""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

_PIECE_BYTES = 12 << 20
_MOST_PIECES = 4
_KEPT = (".cubin", ".json", ".so")  # what Triton loads; the stages before the machine code are for people
_GROUP = "__grp__"  # names an entry's files by absolute paths


class KernelCache:
    """The cache in `folder`, and its pieces in `pieces`."""

    def __init__(self, folder: Path, pieces: Path) -> None:
        self.folder = folder
        self._pieces = pieces
        self._saved: set[str] = set()
        self._number = 0
        self._entries: list[str] = []  # of the piece that still grows

    def restore(self, pieces: Path) -> int:
        """Unpack the pieces of an earlier run; returns the number of entries."""
        count = 0
        for path in sorted(pieces.glob("triton-cache-*.tar.gz")):
            with tarfile.open(path) as piece:
                if hasattr(tarfile, "data_filter"):  # Python 3.11.2 (Debian 12) lacks it
                    piece.extraction_filter = tarfile.data_filter
                piece.extractall(self.folder)
        for path in self.folder.glob(f"*/{_GROUP}*"):
            group = json.loads(path.read_text())
            here = {name: str(path.parent / name) for name in group["child_paths"]}
            path.write_text(json.dumps({"child_paths": here}))
            count += 1
        return count

    def save(self) -> None:
        """Pack what has been compiled since the last call: into the last piece while that is small, then a new one."""
        if not self.folder.is_dir() or self._number >= _MOST_PIECES:
            return
        new = sorted(entry.name for entry in self.folder.iterdir() if entry.is_dir() and entry.name not in self._saved)
        if not new:
            return
        self._pieces.mkdir(parents=True, exist_ok=True)
        self._saved.update(new)
        self._entries += new
        path = self._pieces / f"triton-cache-{self._number}.tar.gz"
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode="w:gz", compresslevel=6) as piece:
            for name in self._entries:
                for file in sorted((self.folder / name).iterdir()):
                    if file.suffix in _KEPT or file.name.startswith(_GROUP):
                        piece.add(file, arcname=f"{name}/{file.name}")
        unfinished = path.with_suffix(".part")
        unfinished.write_bytes(content.getvalue())
        unfinished.replace(path)
        if content.tell() > _PIECE_BYTES:
            self._number, self._entries = self._number + 1, []
