"""The compiled library: what is built, by whom, and what is said when it is not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from scalellm.kernels.cpu import library
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
