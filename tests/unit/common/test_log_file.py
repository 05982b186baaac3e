"""Logs of a bounded size: of one process, of several that share the file, and of what is no Python."""

import asyncio
import os
import re
import subprocess
import sys
from pathlib import Path

from scalellm.launcher.processes import last_error, last_message, spawn
from scalellm.services.common.log_file import LOG_BYTES, log_files
from service_processes import PATIENCE

WRITER = """
import logging, os, pathlib, subprocess, sys
from scalellm.services.common.log_file import BoundedLog
limit, writers, lines, name = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
handler = logging.StreamHandler(sys.stderr)
handler.setFormatter(logging.Formatter("12:00:00 %(levelname)s x: %(message)s"))
handler.addFilter(BoundedLog(pathlib.Path(os.environ["SCALELLM_SERVICE_LOG"]), limit))
logging.basicConfig(level="INFO", handlers=[handler])
command = [sys.executable, "-c", sys.argv[5], str(limit), "0", str(lines)]
children = [subprocess.Popen([*command, f"{name}.{number}", sys.argv[5]]) for number in range(writers)]
for number in range(lines):
    logging.info("line %s %d", name, number)
    os.write(1, b"printed %s %d\\n" % (name.encode(), number))
for child in children:
    child.wait()
if writers:
    logging.error("the last line")
"""


def run(name: str, command: list[str], log: Path) -> int:
    """Run a command as a service is run; its exit code."""

    async def spawn_and_wait() -> int:
        _, process = await spawn(name, name, command, log, os.environ)
        return await asyncio.wait_for(process.wait(), PATIENCE)

    return asyncio.run(spawn_and_wait())


def written(tmp_path: Path, limit: int, writers: int, lines: int) -> Path:
    """The log of a process and its children, after all have ended."""
    log = tmp_path / "executor-0.log"
    assert (
        run("executor-0", [sys.executable, "-c", WRITER, str(limit), str(writers), str(lines), "w", WRITER], log) == 0
    )
    return log


def test_no_line_is_lost_while_processes_share_the_log(tmp_path: Path) -> None:
    log = written(tmp_path, 16_000, 3, 200)
    text = "".join(file.read_text() for file in reversed(log_files(log)) if file.exists())
    assert log_files(log)[1].exists(), "it was put aside at least once"
    for name in ("w", "w.0", "w.1", "w.2"):
        for kind in ("line", "printed"):
            found = [int(number) for number in re.findall(rf"{kind} {re.escape(name)} (\d+)$", text, re.MULTILINE)]
            assert found == list(range(200)), (kind, name)


def test_the_size_is_bounded_and_the_last_error_is_still_told(tmp_path: Path) -> None:
    limit = 20_000
    log = written(tmp_path, limit, 2, 3000)
    assert sorted(tmp_path.iterdir()) == sorted(log_files(log))
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 3 * limit + 20_000
    assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {0o600}
    assert last_error(str(log)).endswith("ERROR x: the last line")
    os.rename(log, log_files(log)[1])
    log.write_text("12:00:01 INFO x: began anew\n")
    assert last_error(str(log)).endswith("ERROR x: the last line"), "it stands in the part that was put aside"
    assert last_message(str(log)) == "began anew"


def test_a_service_bounds_its_log_and_starts_with_none(tmp_path: Path) -> None:
    log = tmp_path / "scheduler.log"
    for file in log_files(log):
        file.write_text("of an earlier start")
    script = (
        f"import os, logging; os.write(2, b'x' * {LOG_BYTES - 1} + b'\\n'); "
        "from scalellm.services.common.logs import configure_logging; "
        "from scalellm.services.common.settings import ServiceSettings; "
        "configure_logging('scheduler', ServiceSettings()); logging.info('after it'); os.write(1, b'printed\\n')"
    )
    assert run("scheduler", [sys.executable, "-c", script], log) == 0
    current, old, oldest = log_files(log)
    assert current.read_text().endswith("root: after it\nprinted\n")
    assert current.read_text().count("\n") == 2
    assert old.stat().st_size == LOG_BYTES
    assert not oldest.exists()


def test_another_stream_than_the_log_is_left_alone(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    log.write_text("x" * 100)
    command = [sys.executable, "-c", WRITER, "10", "0", "3", "w", WRITER]
    environment = {**os.environ, "SCALELLM_SERVICE_LOG": str(log)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.stderr.count("line w") == 3
    assert log.read_text() == "x" * 100
    assert list(tmp_path.iterdir()) == [log]
