"""The server's wheel in a fresh environment, beside packages whose names it must not take."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from service_processes import PATIENCE

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]
FOLDERS = ("scalellm", "services", "kernels", "clients")
FILES = ("LICENSE", "NOTICE", "README.md", "pyproject.toml")

PROGRAM = """
import importlib, json, pkgutil, sys
import kernels  # Hugging Face's, not ours
import transformers
import scalellm

failed = {}
for module in pkgutil.walk_packages(scalellm.__path__, "scalellm."):
    if "__main__" in module.name or ".triton." in module.name or ".aot." in module.name:
        continue  # programs, and what needs Triton
    try:
        importlib.import_module(module.name)
    except Exception as error:
        failed[module.name] = repr(error)
print(json.dumps({"failed": failed, "kernels": kernels.__file__, "scalellm": scalellm.__file__}))
"""


def run(*command: str | Path, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=5 * PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_stands_beside_kernels_and_transformers(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("node_modules"))
    for name in FILES:
        shutil.copy(ROOT / name, source)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, source, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")

    run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    pip = (python, "-m", "pip", "--disable-pip-version-check", "install", "-c", ROOT / "constraints.txt")
    run(*pip, "torch", cwd=tmp_path)  # constraints.txt names the build
    run(*pip, f"{wheel}[local]", "kernels", "transformers", cwd=tmp_path)
    (tmp_path / "program.py").write_text(PROGRAM)
    found = json.loads(run(python, "-I", tmp_path / "program.py", cwd=tmp_path))
    assert found["failed"] == {}
    for name in ("kernels", "scalellm"):
        assert found[name].startswith(str(tmp_path / "venv")), found
    top = {path.name for path in (tmp_path / "venv").glob("lib/*/site-packages/*") if path.is_dir()}
    assert not top & {"services", "clients", "bench", "tests"}
    help_text = run(tmp_path / "venv" / "bin" / "scalellm", "--version", cwd=tmp_path)
    assert help_text.startswith("scalellm ")
