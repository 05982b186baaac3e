"""The logs of an instance's services, read while they are written and put aside, and how their lines are shown."""

from __future__ import annotations

import heapq
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

from scalellm.services.common.log_file import log_files

_CHUNK = 2**16

# A line that is longer is shown in parts.
_MAX_LINE = 2**20

# The beginning of a log line of our services, and of Redis, after its process and role; in JSON it is a field.
_TIMES = (
    (re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),(\d{3}) "), "%Y-%m-%d %H:%M:%S"),
    (re.compile(r"\d+:[A-Z] (\d\d \w{3} \d{4} \d\d:\d\d:\d\d)\.(\d{3}) "), "%d %b %Y %H:%M:%S"),
)


class LogFollower:
    """The lines of one log, each once, from one `read` to the next.

    Processes that share a log may still write to the part that was put aside while others go on in a new one: all parts
    are followed.

    Args:
        log: The file that is written to; it need not be there yet.
        from_start: Begin with the oldest line; else with what comes from now on.
    """

    def __init__(self, log: Path, *, from_start: bool = True) -> None:
        self._log = log
        self._parts: dict[tuple[int, int], _Part] = {}
        if not from_start:
            self._look()
            for part in self._parts.values():
                part.skip()

    def read(self) -> Iterator[str]:
        """The lines that were completed since the last time, without line ends."""
        gone = self._look()
        for part in gone:
            yield from part.lines()
            part.close()
        for part in self._parts.values():
            yield from part.lines()

    def close(self) -> None:
        """Close the files."""
        for part in self._parts.values():
            part.close()

    def _look(self) -> list[_Part]:
        """Find the parts that are there, from the oldest to the newest. Returns those that have been removed."""
        found: dict[tuple[int, int], _Part] = {}
        for path in reversed(log_files(self._log)):
            try:
                identity = _identity(path.stat())
                if identity not in self._parts:
                    stream = path.open("rb")
                    identity = _identity(os.fstat(stream.fileno()))  # it may have been put aside meanwhile
                    self._parts.setdefault(identity, _Part(stream))
            except OSError:
                continue
            found[identity] = self._parts[identity]
        gone = [part for identity, part in self._parts.items() if identity not in found]
        self._parts = found
        return gone


class _Part:
    """One file of a log."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._rest = b""

    def skip(self) -> None:
        self._stream.seek(0, os.SEEK_END)

    def lines(self) -> Iterator[str]:
        while chunk := self._stream.read(_CHUNK):
            *whole, self._rest = (self._rest + chunk).split(b"\n")
            if len(self._rest) > _MAX_LINE:
                whole.append(self._rest)
                self._rest = b""
            for line in whole:
                yield line.decode(errors="replace")

    def close(self) -> None:
        self._stream.close()


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def shown_line(service: str, line: str, *, as_json: bool = False) -> str:
    """A line beside those of other services: a JSON object, which has the service's name, as it is; others behind it.

    Args:
        service: Service of the log.
        line: The line.
        as_json: Make an object of what is none.
    """
    if _parsed(line) is not None:
        return line
    if not as_json:
        return f"{service:<12}| {line}"
    now = datetime.now().astimezone().isoformat()
    return json.dumps({"timestamp": now, "level": "INFO", "service": service, "message": line})


def merged(followers: Mapping[str, LogFollower]) -> Iterator[tuple[str, str]]:
    """The new lines of several logs by their times, as pairs of a service's name and a line.

    A line that has no time, as those of a traceback, stays behind the one before it.
    """

    def timed(service: str, follower: LogFollower) -> Iterator[tuple[float, str, str]]:
        last = 0.0
        for line in follower.read():
            last = _time(line) or last
            yield last, service, line

    streams = [timed(service, follower) for service, follower in followers.items()]
    for _, service, line in heapq.merge(*streams, key=lambda entry: entry[0]):
        yield service, line


def _parsed(line: str) -> dict[str, object] | None:
    if not line.startswith("{"):
        return None
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


def _time(line: str) -> float | None:
    """Return when a line was logged, in seconds since the epoch; None when it does not say."""
    try:
        if (entry := _parsed(line)) is not None:
            return datetime.fromisoformat(str(entry.get("timestamp"))).timestamp()
        for pattern, form in _TIMES:
            if found := pattern.match(line):
                return time.mktime(time.strptime(found[1], form)) + int(found[2]) / 1000
    except (ValueError, OverflowError):
        pass
    return None
