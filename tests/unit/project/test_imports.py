"""Imports go one way: what may import what, held by reading every module's imports."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SERVICES = ("tokenizer", "scheduler", "executor")
ENGINE = tuple(f"services/executor/{part}" for part in ("engine", "model_config", "models", "runner", "weights"))
TEXT_CORE = ("services/tokenizer/text",)
CLIENTS = ("scalellm.cli", "scalellm.launcher", "scalellm.client")


def modules(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


@functools.cache
def read(path: Path) -> tuple[tuple[str, ...], frozenset[str]]:
    """Names of all modules that a file imports, at any depth of the file, and of the functions that it calls.

    Each file is parsed once, for all tests.
    """
    names: list[str] = []
    called: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.append(node.module or "")
            names += (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            called.add(node.func.id)
    return tuple(names), frozenset(called)


def imported(path: Path) -> tuple[str, ...]:
    return read(path)[0]


def offenders(folder: str, *forbidden: str) -> list[str]:
    return [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in modules(folder)
        for name in imported(path)
        if any(name == prefix or name.startswith(f"{prefix}.") for prefix in forbidden)
    ]


@pytest.mark.parametrize("folder", ["kernels", "services", "clients", "bench", "tests"])
def test_modules_are_named_by_the_package(folder: str) -> None:
    """By the name of its folder a module would be loaded a second time, and only a checkout has it."""
    assert offenders(folder, "services", "kernels", "clients") == []


def test_kernels_import_nothing_of_ours() -> None:
    assert (
        offenders("kernels", "scalellm.services", "scalellm.v1", *CLIENTS, "bench", "grpc", "transformers", "numpy")
        == []
    )


@pytest.mark.parametrize("service", SERVICES)
def test_services_do_not_import_each_other(service: str) -> None:
    others = [f"scalellm.services.{other}" for other in SERVICES if other != service]
    assert offenders(f"services/{service}", *others, *CLIENTS, "bench") == []


def test_common_imports_no_service() -> None:
    assert (
        offenders("services/common", *(f"scalellm.services.{service}" for service in SERVICES), *CLIENTS, "bench") == []
    )


@pytest.mark.parametrize("folder", [*ENGINE, *TEXT_CORE])
def test_cores_know_no_wire(folder: str) -> None:
    assert modules(folder), f"{folder} is gone"
    assert offenders(folder, "grpc", "google.protobuf", "scalellm.v1") == []


@pytest.mark.parametrize("folder", ["services/tokenizer", "services/scheduler"])
def test_only_the_executor_computes(folder: str) -> None:
    assert offenders(folder, "torch", "scalellm.kernels", "transformers") == []


def test_the_client_needs_grpc_and_protobuf_only() -> None:
    own = {*sys.stdlib_module_names, "grpc", "scalellm"}
    names = {name for path in modules("clients/python/client") for name in imported(path)}
    assert {name for name in names if name.split(".")[0] not in own} == {
        *("google.protobuf", "google.protobuf.message", "google.protobuf.message.DecodeError"),
        *(f"google.protobuf.{name}" for name in ("any_pb2", "descriptor_pb2", "descriptor_pool", "duration_pb2")),
        "google.protobuf.message_factory",
    }
    assert not [name for name in names if name.startswith("scalellm.") and name.split(".")[1] not in ("client", "v1")]


def test_no_code_over_the_wire() -> None:
    for folder in ("kernels", "services", "clients"):
        assert offenders(folder, "pickle", "marshal", "shelve", "dill", "cloudpickle") == []
        for path in modules(folder):
            assert not read(path)[1] & {"eval", "exec"}, path


_HEAVY = ("torch", "triton", "scalellm.kernels", "transformers", "numpy", "gguf")


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("scalellm.services.executor.__main__", _HEAVY),  # the front; the engine is another process
        ("scalellm.services.scheduler.__main__", _HEAVY),
        ("scalellm.services.tokenizer.__main__", (*_HEAVY, "tokenizers")),
        ("scalellm.services.tokenizer.worker", (*_HEAVY, "jinja2")),  # templates are rendered in a child
        ("scalellm.cli.main", (*_HEAVY, "tokenizers", "redis", "pydantic", "prometheus_client")),
    ],
)
def test_what_must_start_in_an_instant_imports_nothing_heavy(module: str, heavy: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print(*(name for name in {heavy} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_an_engine_without_a_model_loads_no_torch(model_dir: Callable[[str], Path]) -> None:
    """Loading torch takes three seconds of the CPU, at each start of an engine."""
    code = f"""
import sys
import scalellm.services.executor.engine_process
from scalellm.services.executor.build import build_engine
from scalellm.services.executor.config import ExecutorSettings
build_engine(ExecutorSettings(engine="fake", model={str(model_dir("smollm2-135m-instruct"))!r}), print)
print(*(name for name in ("torch", "triton", "scalellm.kernels", "transformers") if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
