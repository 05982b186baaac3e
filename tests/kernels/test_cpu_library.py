"""The compiled library: what is built, by whom, and what is said when it is not."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scalellm.kernels.cpu import building, library
from service_processes import PATIENCE

SOURCES = list(Path(library.__file__).parent.glob("*.cpp"))


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """A compiler that writes a line for everything it is asked to make and then does what the test says."""

    def install(makes):
        path = tmp_path / "bin" / "c++"
        path.parent.mkdir()
        preprocessed = 'case "$*" in *-dM*) echo "#define __VERSION__ 1"; exit;; esac'
        path.write_text(f'#!/bin/sh\n{preprocessed}\necho made >> "{tmp_path}/calls"\n{makes}\n')
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{path.parent}{os.pathsep}{os.environ['PATH']}")

    return install


def test_two_processes_that_start_at_once_build_once(compiler, tmp_path):
    here = library.load_library(library.default_build_dir())
    if here is None:
        pytest.skip("the C++ forms could not be compiled here")
    built = here._dll._name
    compiler(f'while [ "$1" != "-o" ]; do shift; done; sleep 0.1; cp "{built}" "$2"')
    load = f"library.load_library(pathlib.Path({str(tmp_path)!r}))"
    code = f"import pathlib; from scalellm.kernels.cpu import library; assert {load}"
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [process.wait(PATIENCE) for process in processes] == [0, 0]
    assert len((tmp_path / "calls").read_text().splitlines()) == len(SOURCES) + 1
    assert len(list(tmp_path.glob("cpu-*.so"))) == 1
    assert not [path for path in tmp_path.iterdir() if path.is_dir() and path.name != "bin"]


def test_what_a_failing_compiler_says_is_in_the_warning(compiler, tmp_path, caplog):
    compiler("echo 'vec.h: not today' >&2; exit 1")
    assert library.load_library(tmp_path) is None
    assert library.load_library(tmp_path) is None
    assert len(caplog.records) == 1
    assert "plain torch is used instead" in caplog.text
    assert "c++ failed: vec.h: not today" in caplog.text
    assert not list(tmp_path.glob("cpu-*.so"))


def test_a_shared_object_without_a_function_is_not_used(compiler, tmp_path, caplog):
    compiler('while [ "$1" != "-o" ]; do shift; done; : > "$2"')
    assert library.load_library(tmp_path) is None
    assert "kernels in C++ are not available" in caplog.text


def test_a_shared_object_that_came_with_the_package_is_used_without_a_compiler(tmp_path, monkeypatch):
    here = library.load_library(library.default_build_dir())
    strongest = next((level for level in reversed(building.LEVELS) if level.needs <= building.cpu_features()), None)
    if here is None or strongest is None:
        pytest.skip("this machine has no compiler or no level")
    monkeypatch.setattr(building, "SHIPPED", tmp_path)
    name = building._file_name(strongest.name, strongest.flags)
    monkeypatch.setenv("PATH", "")
    assert library.load_library(tmp_path / "none") is None
    shutil.copy(here._dll._name, tmp_path / name)
    found = library.load_library(tmp_path / "home")
    assert found is not None
    assert found._dll._name == str(tmp_path / name)


def test_a_level_is_taken_only_by_a_cpu_that_has_all_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(building, "SHIPPED", tmp_path)
    for level in building.LEVELS:
        assert building.candidates(level.needs | {"sse2"})[0] is level
        for feature in level.needs:
            assert all(feature not in candidate.needs for candidate in building.candidates(level.needs - {feature}))
    assert building.candidates(()) == [building.NATIVE]


def test_what_came_with_the_package_is_preferred_to_building_a_stronger_level(tmp_path, monkeypatch):
    monkeypatch.setattr(building, "SHIPPED", tmp_path)
    monkeypatch.setenv("PATH", "")
    features = frozenset().union(*(level.needs for level in building.LEVELS))
    shipped = {level.name: tmp_path / building._file_name(level.name, level.flags) for level in building.LEVELS}
    shipped["avx512"].touch()
    first, second, *_ = building.candidates(features)
    assert (first.name, second.name) == ("avx512", "avx2-vnni")
    assert building.library_path(first, tmp_path / "none") == shipped["avx512"]
    with pytest.raises(OSError, match="no compiler"):
        building.library_path(second, tmp_path / "none")


FAILURES = {
    "products are wrong": """const char* self_check() { return "products are wrong"; }""",
    "its self-check ended by SIGILL": "const char* self_check() { __builtin_trap(); }",
    "its self-check ended by SIGSEGV": "const char* self_check() { return *(char* volatile*)8; }",
    "its self-check ended with 3": "void _exit(int); const char* self_check() { _exit(3); return 0; }",
    "undefined symbol: self_check": "",
    "file too short": None,
}


@pytest.fixture
def strongest(tmp_path, monkeypatch):
    """Two levels for this CPU, of which the package has the weaker one as it should be; where the stronger one is."""
    here = library.load_library(library.default_build_dir())
    if here is None:
        pytest.skip("there is no compiler")
    levels = [building.Level(name, (), frozenset()) for name in ("plain", "strong")]
    monkeypatch.setattr(building, "LEVELS", levels)
    monkeypatch.setattr(building, "SHIPPED", tmp_path)
    plain, strong = (tmp_path / building._file_name(level.name, level.flags) for level in levels)
    shutil.copy(here._dll._name, plain)
    return strong


@pytest.mark.parametrize("reason", FAILURES)
def test_a_level_that_fails_its_self_check_gives_way_to_the_next_one(strongest, tmp_path, caplog, reason):
    if FAILURES[reason] is None:
        strongest.touch()
    else:
        compile_it = [building._compiler(), "-x", "c", "-shared", "-fPIC", "-", "-o", str(strongest)]
        subprocess.run(compile_it, input=FAILURES[reason], text=True, check=True)
    found = library.load_library(tmp_path / "home")
    assert found is not None
    assert found.level == "plain"
    assert list(found.passed_over) == ["strong"]
    assert reason in found.passed_over["strong"]
    (record,) = caplog.records
    assert "use plain instructions and not strong: " in record.getMessage()


def test_the_strongest_level_is_used_if_it_computes_what_it_should(strongest, tmp_path, caplog):
    shutil.copy(next(tmp_path.glob("cpu-plain-*")), strongest)
    found = library.load_library(tmp_path / "home")
    assert found is not None
    assert (found.level, found.passed_over, caplog.records) == ("strong", {}, [])


def test_without_any_level_that_computes_what_it_should_torch_is_used(strongest, tmp_path, caplog):
    strongest.touch()
    next(tmp_path.glob("cpu-plain-*")).write_bytes(b"")
    assert library.load_library(tmp_path / "home") is None
    (record,) = caplog.records
    assert "plain torch is used instead: " in record.getMessage()


def test_levels_are_built_with_their_flags(compiler, tmp_path):
    compiler('echo "$@" >> "' + str(tmp_path / "flags") + '"; while [ "$1" != "-o" ]; do shift; done; : > "$2"')
    built = building.build_levels(tmp_path / "levels")
    assert all(path.exists() for path in built)
    assert len(set(built)) == len(building.LEVELS)
    lines = (tmp_path / "flags").read_text().splitlines()
    assert len(lines) == len(building.LEVELS) * (len(SOURCES) + 1)
    for level in building.LEVELS:
        assert sum(" ".join(level.flags) + " -" in line for line in lines) >= len(SOURCES) + 1


def test_levels_have_every_instruction_set_that_the_sources_have_code_for():
    sources = "".join(path.read_text() for path in building.SOURCES.iterdir() if path.suffix in (".cpp", ".h"))
    names = re.findall(r"__((?:AVX|AMX)[A-Z0-9_]*?)__", sources)
    tested = {name.lower().replace("_", "") for name in names} - {"avx"}
    known = {feature.replace("_", "") for level in building.LEVELS for feature in level.needs}
    assert tested <= known
