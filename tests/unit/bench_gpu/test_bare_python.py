"""`make gpu` runs with the Python of a machine that has torch and Triton, and none of the packages of the services."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
ABSENT = (
    "gguf",
    "google.protobuf",
    "grpc",
    "hiredis",
    "pydantic",
    "pydantic_settings",
    "redis",
    "scalellm.v1",
    "typer",
)
PROGRAM = f"""
import importlib, sys
from pathlib import Path
for name in {ABSENT}:
    sys.modules[name] = None  # importing it is an error
for path in sorted(Path("bench/gpu").rglob("*.py")):
    if path.stem != "__main__":
        importlib.import_module(".".join(path.with_suffix("").parts).removesuffix(".__init__"))
from bench.gpu.parts import PARTS
for spec in PARTS:
    getattr(importlib.import_module(spec.module), spec.attribute)()
"""


def test_everything_is_imported_without_them():
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
