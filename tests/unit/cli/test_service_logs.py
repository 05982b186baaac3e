"""Logs that are read while they are written and put aside, and lines of several of them by their times."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from scalellm.launcher.service_logs import LogFollower, merged, shown_line
from scalellm.services.common.log_file import log_files


def put_aside(log: Path) -> None:
    current, old, oldest = log_files(log)
    if old.exists():
        old.replace(oldest)
    current.replace(old)


@pytest.mark.parametrize("seed", range(20))
def test_each_line_is_read_once_whatever_happens_to_the_files(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    log = tmp_path / "a.log"
    follower = LogFollower(log)
    read: list[str] = []
    written: list[str] = []
    streams = [log.open("ab", buffering=0)]
    for number in range(300):
        match chance.randrange(8):
            case 0:
                put_aside(log)
                streams = [streams[-1], log.open("ab", buffering=0)]  # another process still writes to the old one
                read += follower.read()
            case 1 | 2:
                read += follower.read()
            case _:
                line = f"line {number} \u00e4"
                data = f"{line}\n".encode()
                stream = chance.choice(streams)
                cut = chance.randrange(len(data))
                stream.write(data[:cut])
                if chance.random() < 0.3:
                    read += follower.read()
                stream.write(data[cut:])
                written.append(line)
    read += follower.read()
    assert sorted(read) == sorted(written)
    follower.close()


def test_what_was_there_can_be_passed_over_and_what_is_removed_is_read_to_its_end(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    log.write_text("old\n")
    follower = LogFollower(log, from_start=False)
    with log.open("a") as stream:
        stream.write("new\nlast")
    assert list(follower.read()) == ["new"]
    with log.open("a") as stream:
        stream.write(" words\n")
    log.unlink()
    assert list(follower.read()) == ["last words"]
    assert list(follower.read()) == []


def test_lines_come_by_their_times_and_tracebacks_stay_together(tmp_path: Path) -> None:
    texts = {
        "scheduler": "2026-01-02 10:00:00,100 INFO s: a\nTraceback\n  File\n2026-01-02 10:00:00,900 INFO s: e\n",
        "redis": "7:M 02 Jan 2026 10:00:00.300 * b\n",
        "executor-0": '{"timestamp": "2026-01-02T10:00:00.500000", "message": "c"}\n{"timestamp": 7}\n{]\n',
        "tokenizer": "2026-01-02 10:00:00,700 INFO t[1] x: d\n\n\x00\n",
        "gone": "",
    }
    logs = {name: tmp_path / f"{name}.log" for name in texts}
    for name, text in texts.items():
        logs[name].write_text(text)
    lines = list(merged({name: LogFollower(log) for name, log in logs.items()}))
    expected = "scheduler " * 3 + "redis " + "executor-0 " * 3 + "tokenizer " * 3 + "scheduler"
    assert [name for name, _ in lines] == expected.split()


def test_how_lines_are_shown() -> None:
    entry = '{"service": "scheduler"}'
    assert shown_line("scheduler", entry) == shown_line("scheduler", entry, as_json=True) == entry
    assert shown_line("redis", "7:M hello") == "redis       | 7:M hello"
    told = json.loads(shown_line("redis", '7:M "hello"', as_json=True))
    assert (told["service"], told["message"]) == ("redis", '7:M "hello"')
