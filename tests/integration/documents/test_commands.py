"""The commands of README.md and of the tutorial, run as they stand there, on a network of their own.

A page's blocks of `sh` and `python` run one after the other, in one shell and in the checkout. The ports are those that
the page names. A block behind a comment `<!-- not run: reason -->` is left out.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from service_processes import PATIENCE

_LIMIT = 1200
"""Seconds for a page: it starts a line with a real model twice, on a machine that may be busy."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(_LIMIT + 2 * PATIENCE)]

ROOT = Path(__file__).resolve().parents[3]
BLOCK = re.compile(r"(<!-- not run: [^>]+ -->\n\n)?^```(sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NEW_NETWORK = ("unshare", "--net", "bash", "-c", 'ip link set lo up && exec bash "$@"', "bash")
"""Runs a script with a loopback interface of its own."""


def why_no_network() -> str:
    """Return the reason why there can be no network namespace here; empty where there can be one."""
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        return "util-linux or iproute2 is missing"
    done = subprocess.run([*NEW_NETWORK, "-c", "true"], capture_output=True, text=True)
    return done.stderr.strip()


def script_of(page: str) -> str:
    """All blocks of a page, as one script."""
    parts = ["set -eu"]
    for not_run, language, code in BLOCK.findall((ROOT / page).read_text(encoding="utf-8")):
        if not not_run:
            parts.append(code if language == "sh" else f"{sys.executable} - <<'END_OF_PYTHON'\n{code}END_OF_PYTHON")
    return "\n".join(parts)


@pytest.mark.parametrize("page", ["README.md", "docs/tutorial.md"])
def test_commands_of_a_page_work(page: str, tmp_path: Path, model_dir: Callable[[str], Path]) -> None:
    if reason := why_no_network():
        pytest.skip(f"a network namespace takes root: {reason}")
    store = model_dir("smollm2-135m-instruct").parents[1]
    (store / "kernels").mkdir(exist_ok=True)
    for name in ("models", "kernels"):  # those of the machine: neither is fetched or compiled again
        (tmp_path / name).symlink_to(store / name)
    script = tmp_path / "page.sh"
    script.write_text(script_of(page))
    environment = {**os.environ, "SCALELLM_HOME": str(tmp_path), "SCALELLM_TOKENIZER_WORKERS": "1"}
    for name in ("SCALELLM_ADDRESS", "SCALELLM_INSTANCE", "REDIS_URL"):
        environment.pop(name, None)
    try:
        done = subprocess.run(
            [*NEW_NETWORK, str(script)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_LIMIT,
        )
    finally:
        subprocess.run([sys.executable, "-m", "scalellm.cli.main", "down"], env=environment, capture_output=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    if page == "docs/tutorial.md":
        assert "the same answer, to the last character" in done.stdout
