"""Builds the C++ sources into a shared object with the machine's own compiler."""

import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

COMPILERS = ("c++", "g++", "clang++")
FLAGS = (
    *("-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
    *("-fPIC", "-pthread", "-fvisibility=hidden"),
)
NATIVE = ("-march=native",)
SOURCES = Path(__file__).parent
SHIPPED = SOURCES / "built"
"""Folder of the shared objects that came with the package; an installation from sources has none."""

_BUILD_LIMIT_S = 600  # twenty seconds where nobody else computes


class Level(NamedTuple):
    """A set of instructions that the sources have code for.

    Attributes:
        name: Part of the file's name.
        flags: The compiler's flags for it.
        needs: The CPU's features that it takes, as /proc/cpuinfo names them.
    """

    name: str
    flags: tuple[str, ...]
    needs: frozenset[str]


_AVX2 = frozenset({"avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "abm"})
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_VNNI = _AVX512 | {"avx512_vnni"}

LEVELS = (
    Level("avx2", ("-march=x86-64-v3",), _AVX2),
    Level("avx2-vnni", ("-march=x86-64-v3", "-mavxvnni"), _AVX2 | {"avx_vnni"}),
    Level("avx512", ("-march=x86-64-v4",), _AVX512),
    Level("avx512-vnni", ("-march=x86-64-v4", "-mavx512vnni"), _VNNI),
    Level("avx512-bf16", ("-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16"), _VNNI | {"avx512_bf16"}),
)
"""Weakest first. Each instruction set that the sources test for is in one of them."""


def cpu_features() -> frozenset[str]:
    """Return the features of this machine's CPU as Linux names them; empty on another system or kind of CPU."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return frozenset()
    lines = (line.partition(":") for line in cpuinfo.read_text().splitlines())
    return frozenset(next((flags.split() for name, _, flags in lines if name.strip() == "flags"), ()))


def shipped(features: Collection[str]) -> Path | None:
    """Return the shared object for the strongest level of a CPU; None if the package came without one."""
    fitting = [level for level in LEVELS if level.needs.issubset(features)]
    paths = (SHIPPED / _file_name(level.name, level.flags) for level in reversed(fitting))
    return next((path for path in paths if path.exists()), None)


def built_here(folder: Path) -> Path:
    """Return the shared object of these sources for this very CPU, building it when `folder` does not have it yet.

    Several processes may do this at once.

    Raises:
        OSError: there is no compiler, or no place to build.
        subprocess.SubprocessError: the compiler fails.
    """
    compiler = _compiler()
    # The predefined macros name the compiler's version and all instruction sets of this CPU.
    macros = _run(compiler, *FLAGS, *NATIVE, "-dM", "-E", "-x", "c++", os.devnull)
    target = folder / _file_name("native", (compiler, macros))
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / f"{target.stem}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one builds, the others wait for it
            if not target.exists():
                _build(compiler, NATIVE, target)
    return target


def build_levels(folder: Path, levels: Sequence[Level] = LEVELS) -> list[Path]:
    """Build the shared objects of levels. Raises what `built_here` does."""
    compiler = _compiler()
    folder.mkdir(parents=True, exist_ok=True)
    targets = [folder / _file_name(level.name, level.flags) for level in levels]
    for level, target in zip(levels, targets, strict=True):
        _build(compiler, level.flags, target)
    return targets


def _compiler() -> str:
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise OSError(f"there is no compiler ({', '.join(COMPILERS)})")
    return compiler


def _file_name(kind: str, made_with: Sequence[str]) -> str:
    """Name everything that a shared object depends on: sources, flags, and what else it is made with."""
    digest = hashlib.sha256(repr((FLAGS, tuple(made_with))).encode())
    for path in [*_sources(), *sorted(SOURCES.glob("*.h"))]:
        digest.update(f"{path.name}\0".encode() + path.read_bytes() + b"\0")
    return f"cpu-{kind}-{digest.hexdigest()[:24]}.so"


def _sources() -> list[Path]:
    sources = sorted(SOURCES.glob("*.cpp"))
    if not sources:
        raise OSError(f"{SOURCES} has no sources")
    return sources


def _build(compiler: str, level: Sequence[str], target: Path) -> None:
    sources = _sources()
    with tempfile.TemporaryDirectory(dir=target.parent) as unfinished:
        objects = [str(Path(unfinished, f"{source.stem}.o")) for source in sources]
        commands = [(*FLAGS, *level, "-c", "-o", to, str(at)) for to, at in zip(objects, sources, strict=True)]
        with ThreadPoolExecutor() as threads:
            list(threads.map(lambda command: _run(compiler, *command), commands))
        linked = Path(unfinished, target.name)
        _run(compiler, *FLAGS, *level, "-shared", "-o", str(linked), *objects)
        linked.replace(target)  # at once: whoever does not wait sees all of it or nothing


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=_BUILD_LIMIT_S).stdout
