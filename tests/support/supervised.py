"""An instance that a supervisor keeps running, for tests that kill its processes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import redis

from scalellm.launcher import Instance, InstanceStatus, State, read_status
from scalellm.launcher.processes import find
from service_processes import PATIENCE, pause_since


class Silent:
    """The report of a start that nobody watches."""

    def begin(self, stage: str, detail: str) -> None:
        pass

    def waiting(self, detail: str) -> None:
        pass

    def done(self, detail: str) -> None:
        pass


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        began = time.monotonic()
        if condition():
            return
        assert time.monotonic() < deadline
        time.sleep(pause_since(began))


def status_when(instance: Instance, condition: Callable[[InstanceStatus], bool]) -> InstanceStatus:
    """Each service is given two seconds to answer, which a busy machine may exceed."""
    deadline = time.monotonic() + PATIENCE
    while True:
        began = time.monotonic()
        if condition(status := read_status(instance)):
            return status
        assert time.monotonic() < deadline, status
        time.sleep(pause_since(began))


def until_written(redis_url: str) -> None:
    """Wait until the kernel has all that the Redis answered. It writes at the end of a turn of its loop, but for up to
    two seconds not while an fsync is under way (`appendfsync everysec`): what a kill then takes, nobody was promised.
    """
    with redis.Redis.from_url(redis_url) as client:
        until(lambda: client.info("persistence")["aof_buffer_length"] == 0)


def kill(instance: Instance, name: str) -> int:
    """End a service at once; the number of its process."""
    pid = state_of(instance).service(name).pid
    os.kill(pid, signal.SIGKILL)
    return pid


def kill_supervisor(instance: Instance) -> None:
    supervisor = state_of(instance).supervisor
    assert supervisor is not None
    os.kill(supervisor.pid, signal.SIGKILL)
    until(lambda: find(supervisor) is None)


def state_of(instance: Instance) -> State:
    state = instance.load()
    assert state is not None
    return state


def pids(state: State) -> dict[str, int]:
    return {service.name: service.pid for service in state.services}


def processes_of(folder: Path) -> list[int]:
    """Return the running processes that have the folder in their command or environment."""
    found = []
    for process in psutil.process_iter():
        try:
            words = [*process.cmdline(), process.environ().get("SCALELLM_SERVICE_LOG", "")]
        except psutil.Error:
            continue
        if process.status() != psutil.STATUS_ZOMBIE and any(str(folder) in word for word in words):
            found.append(process.pid)
    return found
