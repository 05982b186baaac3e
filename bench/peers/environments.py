"""An environment of its own for each peer, installed once: a stamp says what is in it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

_STAMP = "scalellm-stamp.json"
_LAST_LINES = 8


class PeerError(Exception):
    """A peer cannot be installed or run here; the message says why."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """The recipe of an environment.

    Attributes:
        name: Name of its folder.
        steps: Arguments of pip, one call each, in order.
        programs: Programs that have to be on the path, such as a compiler.
        environment: Added to pip's environment.
        module: Imported once at the end; empty: none. What cannot be imported is not installed, and some packages
            finish their installation only then.
    """

    name: str
    steps: tuple[tuple[str, ...], ...]
    programs: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    module: str = ""

    def digest(self) -> str:
        """Return a digest of the recipe and the Python."""
        text = json.dumps([asdict(self), sys.version_info[:3]], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Environment:
    """An environment that is ready.

    Attributes:
        folder: Folder of the environment.
        versions: Versions of every package in it, by name.
    """

    folder: Path
    versions: Mapping[str, str]

    def program(self, name: str) -> str:
        """Path of an executable in it."""
        return str(self.folder / "bin" / name)


Runner = Callable[[Sequence[str], Mapping[str, str], Path, float], None]


def run_logged(command: Sequence[str], environment: Mapping[str, str], log: Path, limit_s: float) -> None:
    """Run to the end, output appended to `log`. Raises PeerError with the last lines when that is not well."""
    with log.open("a") as output:
        try:
            done = subprocess.run(
                command, stdout=output, stderr=subprocess.STDOUT, env=environment, timeout=limit_s, check=False
            )
        except subprocess.TimeoutExpired:
            raise PeerError(f"not installed after {limit_s:.0f} s: {' '.join(command)} (log: {log})") from None
        except OSError as error:
            raise PeerError(f"{command[0]}: {error.strerror}") from None
    if done.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-_LAST_LINES:])
        raise PeerError(f"`{' '.join(command)}` ended with {done.returncode} (log: {log}):\n{tail}")


class Environments:
    """All environments of a folder.

    Args:
        folder: One folder and one log in it per recipe.
        limit_s: Seconds that one recipe may take.
        may_install: Otherwise only what is there already is used.
        run: Runs a command; another one in tests.
    """

    def __init__(
        self, folder: Path, *, limit_s: float = 1200.0, may_install: bool = True, run: Runner = run_logged
    ) -> None:
        self._folder = folder
        self._limit_s = limit_s
        self._may_install = may_install
        self._run = run

    def ensure(self, recipe: Recipe) -> Environment:
        """The environment; installed anew when its stamp is not this recipe's. Raises PeerError when it cannot be."""
        folder = self._folder / recipe.name
        stamp = _read(folder / _STAMP)
        if stamp is None or stamp.get("recipe") != recipe.digest():
            if not self._may_install:
                raise PeerError("not installed, and --no-install was given")
            stamp = self._install(recipe, folder)
        return Environment(folder, stamp["versions"])

    def _install(self, recipe: Recipe, folder: Path) -> dict[str, Any]:
        missing = [name for name in recipe.programs if shutil.which(name) is None]
        if missing:
            raise PeerError(f"it is built from source, which needs {', '.join(missing)}")
        shutil.rmtree(folder, ignore_errors=True)
        self._folder.mkdir(parents=True, exist_ok=True)
        log = self._folder / f"{recipe.name}.log"
        log.unlink(missing_ok=True)
        environment = {**os.environ, **recipe.environment, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        # What is importable here must not count as installed there.
        environment.pop("PYTHONPATH", None)
        python = str(folder / "bin" / "python")
        deadline = time.monotonic() + self._limit_s
        commands = [
            (sys.executable, "-m", "venv", str(folder)),
            *((python, "-m", "pip", *step) for step in recipe.steps),
            *([(python, "-c", f"import {recipe.module}")] if recipe.module else []),
        ]
        for command in commands:
            self._run(command, environment, log, max(1.0, deadline - time.monotonic()))
        listing = folder / "versions.json"
        self._run((python, "-m", "pip", "list", "--format", "json"), environment, listing, self._limit_s)
        versions = {entry["name"]: entry["version"] for entry in _first_json(listing)}
        stamp: dict[str, Any] = {"recipe": recipe.digest(), "steps": [*map(list, recipe.steps)], "versions": versions}
        # Last: an installation that was interrupted has no stamp.
        (folder / _STAMP).write_text(json.dumps(stamp, indent=2) + "\n")
        return stamp


def _read(path: Path) -> dict[str, Any] | None:
    try:
        stamp: dict[str, object] = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return stamp


def _first_json(path: Path) -> list[dict[str, str]]:
    """The list that pip wrote, whatever warnings stand around it."""
    for line in path.read_text().splitlines():
        if line.startswith("["):
            found: list[dict[str, str]] = json.loads(line)
            return found
    raise PeerError(f"pip listed no packages: {path}")
