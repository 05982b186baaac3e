"""The real command as a process: how tests start it, and read what it writes."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable

from service_processes import PATIENCE

StartCli = Callable[..., subprocess.Popen[str]]
RunCli = Callable[..., tuple[int, str, str]]
ESCAPE = "\x1b"


def finish(process: subprocess.Popen[str], text: str | None = None) -> tuple[int, str, str]:
    out, err = process.communicate(text, timeout=PATIENCE)
    return process.returncode, out, err


def read_to_end(master: int) -> bytes:
    """Return what a terminal's programs write until the last one closes it."""
    received = b""
    try:
        while block := os.read(master, 4096):
            received += block
    except OSError:  # the other side is closed
        pass
    finally:
        os.close(master)
    return received
