"""`scalellm up --foreground` as a process: signals, what is given up, `down` from elsewhere; services are fakes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from scalellm.launcher import Instance, LauncherError, UpOptions, bring_down, bring_up
from service_processes import PATIENCE, ROOT
from supervised import Silent, kill, processes_of, state_of, status_when, until

MakeOptions = Callable[..., UpOptions]


class Foreground:
    """A foreground run; the datagrams that systemd would get are in `told`."""

    def __init__(self, instance: Instance, options: UpOptions, folder: Path) -> None:
        self.instance = instance
        self.told = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.told.bind(f"\0scalellm-test-{os.getpid()}-{folder.name}")
        self.told.settimeout(PATIENCE)
        name = self.told.getsockname().decode().replace("\0", "@")
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("foreground.py"))],
            env={**os.environ, "NOTIFY_SOCKET": name},
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=(folder / "out").open("w"),
            stderr=(folder / "err").open("w"),
            text=True,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),  # as a shell does for `... &`
        )
        assert self.process.stdin is not None
        json.dump({"home": str(instance.home), "options": options.to_message()}, self.process.stdin)
        self.process.stdin.write("\n")
        self.process.stdin.close()
        self._folder = folder

    def said(self) -> str:
        return self.told.recv(1000).decode()

    @property
    def out(self) -> str:
        return (self._folder / "out").read_text()

    @property
    def err(self) -> str:
        return (self._folder / "err").read_text()

    def wait(self) -> int:
        return self.process.wait(PATIENCE)


@pytest.fixture
def start(instance: Instance, up_options: MakeOptions, tmp_path: Path) -> Iterator[Callable[..., Foreground]]:
    started: list[Foreground] = []

    def begin(behaviour: dict[str, str] | None = None, **changes: object) -> Foreground:
        folder = tmp_path / f"foreground-{len(started)}"
        folder.mkdir()
        started.append(Foreground(instance, up_options(behaviour, **changes), folder))
        return started[-1]

    yield begin
    for foreground in started:
        foreground.process.kill()
        foreground.process.wait()
        foreground.told.close()


def test_it_shows_all_logs_keeps_things_running_and_ends_by_a_signal(
    start: Callable[..., Foreground], instance: Instance, up_options: MakeOptions
) -> None:
    foreground = start()
    assert foreground.said().startswith("READY=1\nSTATUS=serving fake at 127.0.0.1:")
    with pytest.raises(LauncherError, match="already running at"):
        bring_up(instance, up_options(), Silent())
    dead = kill(instance, "scheduler")
    until(lambda: state_of(instance).service("scheduler").pid != dead)
    status_when(instance, lambda status: status.healthy and status.supervised)
    foreground.process.send_signal(signal.SIGINT)
    assert foreground.said().startswith("STOPPING=1")
    assert (foreground.wait(), foreground.err) == (0, "")
    assert {line.partition("|")[0].strip() for line in foreground.out.splitlines()} >= {"redis", "supervisor"}
    assert "supervisor: scheduler ended with signal SIGKILL" in foreground.out
    assert "supervisor: stopping tokenizer" in foreground.out
    assert processes_of(instance.folder) == []
    assert instance.load() is None


def test_what_is_given_up_ends_everything_with_the_reason(start: Callable[..., Foreground], instance: Instance) -> None:
    foreground = start(max_restarts=0)
    foreground.said()
    kill(instance, "executor-0")
    assert foreground.wait() == 1
    assert foreground.err.startswith("error: executor-0 is given up: it ended once within 10 minutes; the last time, ")
    assert processes_of(instance.folder) == []


def test_down_from_elsewhere_ends_it(start: Callable[..., Foreground], instance: Instance) -> None:
    foreground = start()
    foreground.said()
    result = bring_down(instance, lambda name: None)
    assert (result.crashed, result.killed, result.logs) == ((), (), "")
    assert (foreground.wait(), foreground.err) == (0, "")


def test_a_start_that_is_stopped_or_fails_leaves_nothing(start: Callable[..., Foreground], instance: Instance) -> None:
    foreground = start({"executor": "hang"})
    until(lambda: instance.load() is not None and "executor-0: loading" in foreground.out)
    foreground.process.terminate()
    assert foreground.wait() == signal.SIGTERM
    assert processes_of(instance.folder) == []
    foreground = start({"scheduler": "crash"})
    assert foreground.wait() == 1
    assert foreground.err.startswith("error: scheduler ended with exit code 1: no room for the weights")
    assert processes_of(instance.folder) == []


def test_a_second_signal_does_not_wait(start: Callable[..., Foreground], instance: Instance) -> None:
    foreground = start({"tokenizer": "stubborn"})
    foreground.said()
    foreground.process.terminate()
    assert foreground.said().startswith("STOPPING=1")
    foreground.process.terminate()
    assert foreground.wait() == 0
    assert processes_of(instance.folder) == []
