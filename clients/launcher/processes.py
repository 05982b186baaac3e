"""Starting, watching and ending the processes of an instance; never anybody else's."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from scalellm.launcher.errors import LauncherError
from scalellm.launcher.instance import ServiceRecord
from scalellm.services.common.child_environment import SERVICE_LOG
from scalellm.services.common.child_process import ChildProcess
from scalellm.services.common.log_file import log_files
from scalellm.services.common.new_file import create_file

# psutil derives a process's creation time from the wall clock at boot, which time synchronisation may move a little.
_CLOCK_SLACK = 5.0

# A killed process is gone within milliseconds, unless it waits for a device that does not answer.
_KILL_LIMIT = 5.0

_POLL = 0.5
_LAST_LINES = 40
_LAST_BYTES = 16_384


class FoundProcess:
    """The process of a service that another supervisor has started.

    Args:
        record: Record of the process.
    """

    def __init__(self, record: ServiceRecord) -> None:
        self._record = record

    @property
    def is_running(self) -> bool:
        """False once it has ended."""
        return find(self._record) is not None

    async def wait(self) -> None:
        """Return once it has ended; how, only the one who started it is told."""
        while self.is_running:  # noqa: ASYNC110 - nobody here sets an event
            await asyncio.sleep(_POLL)


async def spawn(
    name: str, kind: str, command: Sequence[str], log: Path, environment: Mapping[str, str], *, again: bool = False
) -> tuple[ServiceRecord, ChildProcess]:
    """Start `command` as the leader of a new session, without input, with its output in the file `log`.

    Args:
        name: Name of the service.
        kind: Kind of the service.
        command: Program and arguments.
        log: A new file; with `again`, its output goes on in the file that is there.
        environment: All its variables.
        again: The service is started again.

    Raises LauncherError.
    """
    output = _open_log(log, again)
    try:
        process = await ChildProcess.start(
            command,
            {**environment, SERVICE_LOG: str(log)},
            listens=False,
            output=output,
            errors=output,
            own_session=True,
        )
    except OSError as error:
        raise LauncherError(f"cannot start {name}: {command[0]}: {error.strerror}") from None
    finally:
        os.close(output)
    return record_of(process.pid, name, kind, log), process


def _open_log(log: Path, again: bool) -> int:
    if again:
        with contextlib.suppress(OSError):
            return os.open(log, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC)
    for old in log_files(log):
        old.unlink(missing_ok=True)
    return create_file(log, flags=os.O_APPEND)


def record_of(pid: int, name: str, kind: str, log: Path) -> ServiceRecord:
    """Return a record that tells a process that was just started from a later one with its number."""
    try:
        create_time = psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:  # it is our child and not waited for, so only a reaper could have taken it
        create_time = time.time()
    return ServiceRecord(name=name, kind=kind, pid=pid, create_time=create_time, log=str(log))


def find(record: ServiceRecord) -> psutil.Process | None:
    """The process of `record` if it still runs: not a zombie, and not another one that took over its pid."""
    try:
        process = psutil.Process(record.pid)
        if abs(process.create_time() - record.create_time) > _CLOCK_SLACK:
            return None
        return None if process.status() == psutil.STATUS_ZOMBIE else process
    except psutil.NoSuchProcess:
        return None


def session_of(record: ServiceRecord) -> list[psutil.Process]:
    """Return the running processes of the session that `record` leads: its own and, also after its death, offspring."""
    try:
        leader = psutil.Process(record.pid)
        if abs(leader.create_time() - record.create_time) > _CLOCK_SLACK:
            return []  # the pid was used again, which the kernel allows only once the session is empty
    except psutil.NoSuchProcess:
        pass
    return [process for process in psutil.process_iter() if _belongs(process, record)]


def _belongs(process: psutil.Process, record: ServiceRecord) -> bool:
    try:
        return (
            os.getsid(process.pid) == record.pid
            and process.create_time() > record.create_time - _CLOCK_SLACK
            and process.status() != psutil.STATUS_ZOMBIE
            # After a reboot, and in a container that was started again, pids and sessions are given out afresh: the
            # number of a session is not enough to kill by.
            and (process.pid == record.pid or process.environ().get(SERVICE_LOG) == record.log)
        )
    except (psutil.Error, OSError):
        return False


def terminate(records: Sequence[ServiceRecord], limit: float) -> list[ServiceRecord]:
    """Ask the processes to end, wait up to `limit` seconds, then kill what is left; return those that were killed."""
    for record in records:
        _signal(record, signal.SIGTERM)
    deadline = time.monotonic() + limit
    while (left := [record for record in records if find(record)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    # A leader that is gone may have left children behind, whom nobody else would end.
    for record in records:
        for process in session_of(record):
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
    deadline = time.monotonic() + _KILL_LIMIT
    while any(session_of(record) for record in records) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


def _signal(record: ServiceRecord, number: signal.Signals) -> None:
    process = find(record)
    if process is not None:
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            return


def last_lines(log: str) -> list[str]:
    """The last lines of a log, without blank ones, also of the part that was put aside; empty when there is none."""
    end = b""
    for file in log_files(Path(log)):
        end = _end(file, _LAST_BYTES - len(end)) + end
        if len(end) == _LAST_BYTES:
            break
    lines = end.decode(errors="replace").splitlines()
    return [line.rstrip() for line in lines if line.strip()][-_LAST_LINES:]


def _end(file: Path, size: int) -> bytes:
    """The last bytes of a file, at most `size`; none when there is no file."""
    try:
        with file.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - size))
            return stream.read(size)
    except OSError:
        return b""


def last_error(log: str) -> str:
    """The line of a log that says most about why its service is not well; empty when none does."""
    lines = [_shown(line) for line in last_lines(log)]
    for line in reversed(lines):
        if line.startswith("error: "):
            return line.removeprefix("error: ")
    for index in reversed(range(len(lines))):
        if lines[index].startswith("Traceback (most recent call last)"):
            # The exception stands below its traceback, the one line that is not indented.
            return next((line for line in lines[index + 1 :] if not line.startswith(" ")), lines[-1])
    for line in reversed(lines):
        if " ERROR " in line or " CRITICAL " in line:
            return line
    return ""


def last_message(log: str) -> str:
    """Return the last message of a service, without time and place; empty when there is none."""
    for line in map(_shown, reversed(last_lines(log))):
        head, separator, message = line.partition(": ")
        if separator and " INFO " in head:
            return message
    return ""


def _shown(line: str) -> str:
    """A line as `--log-format text` would have it; what is not JSON stays as it is."""
    if not line.startswith("{"):
        return line
    try:
        entry = json.loads(line)
        head = f"{entry['timestamp']} {entry['level']} {entry['service']}[{entry['pid']}] {entry['logger']}"
        return f"{head}: {entry['message']}"
    except (ValueError, KeyError, TypeError):
        return line
