"""The Python client installed by itself: what it needs, and what works with that."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from line import Line
from scalellm import __version__
from service_processes import PATIENCE

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]

PROGRAM = """
import asyncio, json, sys
import scalellm.client
from scalellm.client import AsyncClient, Client, ClientError
from scalellm.v1.common_pb2 import SamplingParams
from scalellm.v1.generation_pb2 import ON_DISCONNECT_KEEP, GenerateRequest

address = sys.argv[1]
sampling = SamplingParams(max_tokens=200, seed=3, ignore_eos=True)
kept = GenerateRequest(prompt="Once upon", sampling=sampling, request_id="kept", on_disconnect=ON_DISCONNECT_KEEP)


async def with_asyncio():
    async with AsyncClient(address) as client:
        text = "".join([piece async for piece in client.complete("Once upon", sampling).text()])
        resumed = "".join([piece async for piece in client.resume("kept", begun.offsets).text()])
        return text, resumed


with Client(address) as client:
    text = "".join(client.complete("Once upon", sampling, timeout=60).text())
    with client.generate(kept) as begun:
        first = next(begun.text())
    text_of_async, rest = asyncio.run(with_asyncio())
    turns = []
    for question in ("My name is Ada.", "What is my name?"):
        stream = client.chat([("user", question)], SamplingParams(max_tokens=4), session_id="s")
        list(stream)
        turns.append(stream.started.session_turns)
    try:
        list(client.complete("x", SamplingParams(top_p=7)).text())
    except ClientError as error:
        refused = [error.code.name, error.field]

imported = {name.partition(".")[0] for name, module in sys.modules.items() if getattr(module, "__spec__", None)}
imported -= set(sys.stdlib_module_names)
print(json.dumps({
    "file": scalellm.client.__file__,
    "texts": [text, text_of_async, first + rest],
    "turns": turns,
    "refused": refused,
    "imported": sorted(name for name in imported if not name.startswith("_")),
}))
"""


def run(*command: str | Path, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=5 * PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build_wheel(folder: Path) -> Path:
    """Build the sdist from what is checked out, and the wheel from the sdist."""
    shutil.copytree(ROOT / "clients" / "python", folder / "clients" / "python", symlinks=True)
    shutil.copytree(ROOT / "scalellm", folder / "scalellm", symlinks=True)
    for name in ("LICENSE", "NOTICE"):  # the client's are links to these
        shutil.copy(ROOT / name, folder)
    build = "from setuptools import build_meta; build_meta.build_sdist({!r})"
    run(sys.executable, "-c", build.format(str(folder)), cwd=folder / "clients" / "python")
    (sdist,) = folder.glob("scalellm_client-*.tar.gz")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, sdist, cwd=folder)
    (wheel,) = folder.glob("scalellm_client-*.whl")
    return wheel


def test_the_wheel_needs_grpcio_and_protobuf_only(line: Line, tmp_path: Path) -> None:
    wheel = build_wheel(tmp_path)
    assert wheel.name == f"scalellm_client-{__version__}-py3-none-any.whl"
    run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    pip = (python, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "install", "-c", ROOT / "constraints.txt", wheel, cwd=tmp_path)
    installed = {package["name"] for package in json.loads(run(*pip, "list", "--format", "json", cwd=tmp_path))}
    assert installed - {"pip", "setuptools"} == {"grpcio", "protobuf", "scalellm-client", "typing_extensions"}

    (tmp_path / "program.py").write_text(PROGRAM)
    found = json.loads(run(python, "-I", tmp_path / "program.py", line.address, cwd=tmp_path))
    assert Path(found["file"]).is_relative_to(tmp_path / "venv")
    assert found["imported"] == ["google", "grpc", "scalellm", "typing_extensions"]
    assert len(set(found["texts"])) == 1, "the same seed gives the same text, in one piece or resumed"
    assert len(found["texts"][0]) > 100
    assert found["turns"] == [0, 1]
    assert found["refused"] == ["INVALID_ARGUMENT", "sampling.top_p"]
