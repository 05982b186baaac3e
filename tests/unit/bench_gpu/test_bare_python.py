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
OF_RANKS = ("ranks", "second_rank")  # whose plans are protobuf messages: their part is skipped there
PROGRAM = f"""
import importlib, sys
from pathlib import Path
for name in {ABSENT}:
    sys.modules[name] = None  # importing it is an error
for path in sorted(Path("bench/gpu").rglob("*.py")):
    if path.stem not in ("__main__", *{OF_RANKS}):
        importlib.import_module(".".join(path.with_suffix("").parts).removesuffix(".__init__"))
from bench.gpu.part import UnavailableError
from bench.gpu.parts import PARTS
from bench.gpu.worker import part_of
for spec in PARTS:
    try:
        part_of(spec)
        assert spec.name != "ranks"
    except UnavailableError as error:
        assert spec.name == "ranks", error
        assert "is not installed here" in str(error)
"""


def test_everything_is_imported_without_them():
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
