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
    paths = {level.name: tmp_path / building._file_name(level.name, level.flags) for level in building.LEVELS}
    for path in paths.values():
        path.touch()
    for level in building.LEVELS:
        assert building.shipped(level.needs | {"sse2"}) == paths[level.name]
        assert all(building.shipped(level.needs - {feature}) != paths[level.name] for feature in level.needs)
    assert building.shipped(()) is None
    paths["avx2"].unlink()
    assert building.shipped(building.LEVELS[0].needs) is None  # built from other sources, or not at all


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
    tested = {name.lower() for name in re.findall(r"__((?:AVX|AMX)[A-Z0-9]*)__", sources)} - {"avx"}
    known = {feature.replace("_", "") for level in building.LEVELS for feature in level.needs}
    assert tested <= known
