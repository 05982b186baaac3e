"""Processes that tests start end with the tests, and not before."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from service_processes import PATIENCE, ROOT, start_process

SLEEPER = [sys.executable, "-c", "import time; time.sleep(3600)"]
_NAMES = [word.encode() for word in SLEEPER]


def test_a_process_outlives_the_thread_that_asked_for_it() -> None:
    started: list[subprocess.Popen[bytes]] = []
    thread = threading.Thread(target=lambda: started.append(start_process(SLEEPER)))
    thread.start()
    thread.join()
    (process,) = started
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.kill()
    process.wait(PATIENCE)


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv")
def test_a_process_ends_with_tests_that_are_killed(tmp_path: Path) -> None:
    script = tmp_path / "tests.py"
    script.write_text(
        "import os, pathlib, signal, sys, time\n"
        f"sys.path.insert(0, {str(ROOT / 'tests/support')!r})\n"
        "from service_processes import start_process\n"
        f"child = start_process({SLEEPER!r}, stdout=sys.stdout)\n"
        # Only from then on, when setpriv has become the program, does it end with its parent.
        f"while pathlib.Path(f'/proc/{{child.pid}}/cmdline').read_bytes().split(bytes(1))[:3] != {_NAMES!r}:\n"
        "    time.sleep(0.01)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE)
    assert killed.stdout is not None
    killed.stdout.read()  # until both have closed it
    assert killed.wait(PATIENCE) == -signal.SIGKILL
