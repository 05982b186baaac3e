"""The command line as an operator runs it: each command a process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


class Cli:
    """Commands with a home of their own."""

    def __init__(self, home: Path, **variables: str) -> None:
        self.environment = {**os.environ, "SCALELLM_HOME": str(home), "SCALELLM_ADDRESS": "", "REDIS_URL": ""}
        self.environment |= {"OMP_NUM_THREADS": "1", "SCALELLM_TOKENIZER_WORKERS": "1", **variables}

    def run(self, *arguments: str, **variables: str) -> tuple[int, str, str]:
        done = subprocess.run(
            [sys.executable, "-m", "scalellm.cli.main", *arguments],
            env={**self.environment, **variables},
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=240,
        )
        return done.returncode, done.stdout, done.stderr
