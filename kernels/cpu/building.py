"""Builds the C++ sources into a shared object with the machine's own compiler."""

import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
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
TUNE = ("-mtune=native",)
"""Additional flags, beside those of the level, for a build that runs on this machine only."""
SOURCES = Path(__file__).parent
SHIPPED = SOURCES / "built"
"""Folder of the shared objects that are shipped with the package. An installation from sources has none."""

_BUILD_LIMIT_S = 600  # takes twenty seconds on an idle machine


class Level(NamedTuple):
    """A level of CPU instructions for which the sources have code.

    Attributes:
        name: Part of the file's name.
        flags: The compiler's flags for it.
        needs: The required CPU features, as /proc/cpuinfo names them.
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
    Level(
        "amx",
        ("-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16", "-mamx-tile", "-mamx-bf16", "-mamx-int8"),
        _VNNI | {"avx512_bf16", "amx_tile", "amx_bf16", "amx_int8"},
    ),
)
"""All levels, weakest first. Each instruction set that the sources test for is in one of them."""

NATIVE = Level("native", ("-march=native",), frozenset())
"""The level with all features that the compiler detects, for a CPU that no level of LEVELS fits: an older one, or one
of another architecture."""

_CHECK_LIMIT_S = 120  # takes hundredths of a second on an idle machine
_CHECK = """
import ctypes, sys
check = ctypes.CDLL(sys.argv[1]).self_check
check.restype = ctypes.c_char_p
print((check() or b"").decode())
"""


class FaultyLibraryError(Exception):
    """A shared object cannot run on this machine, or computes wrong results."""


def cpu_features() -> frozenset[str]:
    """Return the features of this machine's CPU as Linux names them; empty on another system or kind of CPU."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return frozenset()
    lines = (line.partition(":") for line in cpuinfo.read_text().splitlines())
    return frozenset(next((flags.split() for name, _, flags in lines if name.strip() == "flags"), ()))


def candidates(features: Collection[str]) -> Sequence[Level]:
    """Return the levels that a CPU with these features can run, at least one, strongest first.

    If the package was shipped with shared objects for some of them, stronger ones are not built.
    """
    fitting = [level for level in reversed(LEVELS) if level.needs.issubset(features)]
    strongest_shipped = next((i for i, level in enumerate(fitting) if _shipped(level).exists()), 0)
    return fitting[strongest_shipped:] or [NATIVE]


def library_path(level: Level, folder: Path) -> Path:
    """Return the path of a level's shared object: the one of the package, or else the one in `folder`, built if
    necessary.

    Several processes may call it at the same time.

    Raises:
        OSError: there is no compiler, or `folder` cannot be written.
        subprocess.SubprocessError: the compiler fails.
    """
    if _shipped(level).exists():
        return _shipped(level)
    compiler, flags = _compiler(), (*level.flags, *TUNE)
    # The predefined macros name the compiler's version and the instruction sets that it uses.
    macros = _run(compiler, *FLAGS, *flags, "-dM", "-E", "-x", "c++", os.devnull)
    target = folder / _file_name(level.name, (compiler, macros, *flags))
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / f"{target.stem}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one builds, the others wait for it
            if not target.exists():
                _build(compiler, flags, target)
    return target


def check(library: Path) -> None:
    """Check a shared object on this machine by comparing its products with plain sums; see check.cpp.

    It runs in a process of its own, because that may die of an instruction that the CPU does not have.

    Raises:
        FaultyLibraryError: the results differ, or the process died.
        OSError: the process cannot be started.
    """
    try:
        command = (sys.executable, "-I", "-S", "-c", _CHECK, str(library))
        ended = subprocess.run(command, capture_output=True, text=True, timeout=_CHECK_LIMIT_S)
    except subprocess.TimeoutExpired as error:
        raise FaultyLibraryError(f"its self-check did not end within {_CHECK_LIMIT_S} s") from error
    if ended.returncode < 0:
        raise FaultyLibraryError(f"its self-check ended by {signal.Signals(-ended.returncode).name}")
    said = (ended.stderr if ended.returncode else ended.stdout).strip()
    if said or ended.returncode:
        raise FaultyLibraryError(said.splitlines()[-1] if said else f"its self-check ended with {ended.returncode}")


def build_levels(folder: Path, levels: Sequence[Level] = LEVELS) -> list[Path]:
    """Build the shared objects that are shipped with a package. Raises the errors of `library_path`."""
    compiler = _compiler()
    folder.mkdir(parents=True, exist_ok=True)
    targets = [folder / _shipped(level).name for level in levels]
    for level, target in zip(levels, targets, strict=True):
        _build(compiler, level.flags, target)
    return targets


def _shipped(level: Level) -> Path:
    return SHIPPED / _file_name(level.name, level.flags)


def _compiler() -> str:
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise OSError(f"there is no compiler ({', '.join(COMPILERS)})")
    return compiler


def _file_name(kind: str, made_with: Sequence[str]) -> str:
    """Return a file name with a digest of all inputs of a shared object: sources, flags, and `made_with`."""
    digest = hashlib.sha256(repr((FLAGS, tuple(made_with))).encode())
    for path in [*_sources(), *sorted(SOURCES.glob("*.h"))]:
        digest.update(f"{path.name}\0".encode() + path.read_bytes() + b"\0")
    return f"cpu-{kind}-{digest.hexdigest()[:24]}.so"


def _sources() -> list[Path]:
    sources = sorted(SOURCES.glob("*.cpp"))
    if not sources:
        raise OSError(f"{SOURCES} has no sources")
    return sources


def _build(compiler: str, instructions: Sequence[str], target: Path) -> None:
    sources = _sources()
    with tempfile.TemporaryDirectory(dir=target.parent) as unfinished:
        objects = [str(Path(unfinished, f"{source.stem}.o")) for source in sources]
        commands = [(*FLAGS, *instructions, "-c", "-o", to, str(at)) for to, at in zip(objects, sources, strict=True)]
        with ThreadPoolExecutor() as threads:
            list(threads.map(lambda command: _run(compiler, *command), commands))
        linked = Path(unfinished, target.name)
        _run(compiler, *FLAGS, *instructions, "-shared", "-o", str(linked), *objects)
        linked.replace(target)  # atomically, because processes that do not wait for the lock may read it


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=_BUILD_LIMIT_S).stdout
