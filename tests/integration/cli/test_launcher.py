"""The launcher with real processes: the embedded redis-server, and fakes of the services."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import redis

from scalellm.launcher import (
    Instance,
    InstanceStatus,
    LauncherError,
    NotRunningError,
    State,
    UpOptions,
    bring_down,
    bring_up,
    read_status,
)
from scalellm.launcher.processes import session_of
from service_processes import PATIENCE

MakeOptions = Callable[..., UpOptions]


class Recorder:
    """Collects what `up` reports."""

    def __init__(self) -> None:
        self.stages: list[str] = []

    def begin(self, stage: str, detail: str) -> None:
        self.stages.append(stage)

    def waiting(self, detail: str) -> None:
        pass

    def done(self, detail: str) -> None:
        self.stages.append("ready")


def healthy_status(instance: Instance) -> InstanceStatus:
    """Each service is given two seconds to answer, which a busy machine may exceed."""
    deadline = time.monotonic() + PATIENCE
    while not (status := read_status(instance)).healthy:
        assert time.monotonic() < deadline, status
    return status


def down(instance: Instance, limit: float | None = None) -> tuple[list[str], object]:
    order: list[str] = []
    result = bring_down(instance, order.append, limit)
    return order, result


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def kill_supervisor(state: State) -> None:
    """Nobody is to start again what the test is about to end."""
    assert state.supervisor is not None
    os.kill(state.supervisor.pid, signal.SIGKILL)
    _until(lambda: gone(state.supervisor.pid))


def test_up_status_down_leaves_nothing(instance: Instance, up_options: MakeOptions) -> None:
    recorder = Recorder()
    state = bring_up(instance, up_options(executors=2), recorder)
    assert recorder.stages[::2] == ["redis", "executor-0", "executor-1", "scheduler", "tokenizer"]
    assert instance.load() == state

    status = healthy_status(instance)
    assert {service.name: service.health for service in status.services} == dict.fromkeys(
        recorder.stages[::2], "serving"
    )
    assert status.address == state.public_address
    assert status.supervised
    with redis.Redis.from_url(state.redis_url) as client:
        assert client.config_get("maxmemory")["maxmemory"] != "0"
        assert client.config_get("save")["save"] == ""

    order, result = down(instance)
    assert order == ["tokenizer", "scheduler", "executor-0", "executor-1", "redis"]
    assert (result.crashed, result.killed, result.logs) == ((), (), "")
    assert all(gone(service.pid) for service in (*state.services, state.supervisor))
    assert not instance.folder.exists()
    with pytest.raises(NotRunningError):
        read_status(instance)
    with pytest.raises(NotRunningError):
        down(instance)


def test_up_with_several_models(instance: Instance, up_options: MakeOptions, tmp_path: Path) -> None:
    named = {"executor": "named", "tokenizer": "named"}
    models = {"one": tmp_path / "first", "two": tmp_path / "second"}
    state = bring_up(instance, up_options(named, models=models, executors=2), Recorder())
    executors = ["executor-0", "executor-1", "executor-2", "executor-3"]
    assert [service.name for service in state.of_kind("executor")] == executors
    status = healthy_status(instance)
    assert status.model == state.model == "one, two"
    assert {service.name: service.model for service in status.services if service.model} == {
        **dict(zip(executors, ("one", "one", "two", "two"), strict=True)),
        "tokenizer": "one, two",
    }
    with pytest.raises(LauncherError, match=r"already running at .* \(model one, two\)"):
        bring_up(instance, up_options(named, models=models, executors=2), Recorder())
    down(instance)


def test_second_up_is_refused(instance: Instance, up_options: MakeOptions) -> None:
    state = bring_up(instance, up_options(), Recorder())
    with pytest.raises(LauncherError, match=r"already running at 127\.0\.0\.1:\d+ .*scalellm down"):
        bring_up(instance, up_options(), Recorder())
    assert instance.load() == state
    healthy_status(instance)


def test_crash_at_start_says_why_and_undoes_the_rest(instance: Instance, up_options: MakeOptions) -> None:
    with pytest.raises(
        LauncherError, match=r"scheduler ended with exit code 1: no room for the weights.*log: .*scheduler"
    ):
        bring_up(instance, up_options({"scheduler": "crash"}), Recorder())
    assert instance.load() is None
    assert sorted(path.name for path in instance.logs.iterdir()) == ["executor-0.log", "redis.log", "scheduler.log"]
    assert not [process for process in psutil.process_iter() if str(instance.folder) in " ".join(_cmdline(process))]


def _cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_interrupted_while_it_starts_a_process(instance: Instance, up_options: MakeOptions) -> None:
    started: list[int] = []

    class Interrupter(Recorder):
        def begin(self, stage: str, detail: str) -> None:
            state = instance.load()
            assert state is not None
            assert state.supervisor is not None
            started.extend((state.supervisor.pid, *(service.pid for service in state.services)))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bring_up(instance, up_options(), Interrupter())
    assert len(started) >= 2
    assert [pid for pid in started if not gone(pid)] == []
    assert instance.load() is None


def test_never_healthy_is_given_up(instance: Instance, up_options: MakeOptions) -> None:
    with pytest.raises(LauncherError, match="executor-0 is not healthy after 5 s"):
        bring_up(instance, up_options({"executor": "hang"}, start_limit=5.0), Recorder())
    assert instance.load() is None


def test_up_after_everything_crashed(instance: Instance, up_options: MakeOptions) -> None:
    first = bring_up(instance, up_options(), Recorder())
    kill_supervisor(first)
    for service in first.services:
        os.kill(service.pid, signal.SIGKILL)
    _until(lambda: all(gone(service.pid) for service in first.services))
    second = bring_up(instance, up_options(), Recorder())
    assert {service.pid for service in second.services}.isdisjoint(service.pid for service in first.services)


def test_recycled_pid_is_left_alone(instance: Instance, up_options: MakeOptions) -> None:
    """The state names a pid that now belongs to somebody else's process."""
    state = bring_up(instance, up_options(), Recorder())
    kill_supervisor(state)
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    try:
        tokenizer = state.of_kind("tokenizer")[0]
        os.kill(tokenizer.pid, signal.SIGKILL)
        recycled = replace(tokenizer, pid=stranger.pid, create_time=time.time() - 3600)
        instance.save(state.with_service(recycled))
        assert not read_status(instance).healthy
        _, result = down(instance)
        assert result.crashed == ("tokenizer", "supervisor")
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_recycled_session_is_left_alone(instance: Instance, up_options: MakeOptions) -> None:
    """The state names a pid that is now the session of somebody else's daemon, whose first process has ended."""
    state = bring_up(instance, up_options(), Recorder())
    kill_supervisor(state)
    daemon = "import subprocess, sys; print(subprocess.Popen(['sleep', '600'], stdout=subprocess.DEVNULL).pid)"
    first = subprocess.Popen([sys.executable, "-c", daemon], start_new_session=True, stdout=subprocess.PIPE, text=True)
    stranger = psutil.Process(int(first.communicate(timeout=PATIENCE)[0]))
    try:
        tokenizer = state.of_kind("tokenizer")[0]
        os.kill(tokenizer.pid, signal.SIGKILL)
        instance.save(state.with_service(replace(tokenizer, pid=first.pid, create_time=time.time() - 3600)))
        down(instance)
        assert not gone(stranger.pid)
    finally:
        stranger.kill()


def test_stubborn_service_is_killed_and_named(instance: Instance, up_options: MakeOptions) -> None:
    state = bring_up(instance, up_options({"executor": "stubborn"}), Recorder())
    _, result = down(instance, limit=0.3)
    assert "executor-0" in result.killed
    assert all(gone(service.pid) for service in state.services)


def test_orphans_of_a_crashed_service_are_ended(instance: Instance, up_options: MakeOptions) -> None:
    state = bring_up(instance, up_options({"tokenizer": "orphan"}), Recorder())
    kill_supervisor(state)
    tokenizer = state.of_kind("tokenizer")[0]
    os.kill(tokenizer.pid, signal.SIGKILL)
    _until(lambda: gone(tokenizer.pid))
    orphans = [process.pid for process in session_of(tokenizer)]
    assert len(orphans) == 1
    down(instance)
    assert all(gone(pid) for pid in orphans)


def test_port_in_use_is_said_before_anything_starts(instance: Instance, up_options: MakeOptions) -> None:
    with socket.socket() as taken:
        # As another instance's workers would hold it.
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        recorder = Recorder()
        with pytest.raises(
            LauncherError, match=rf"port {port} \(tokenizer\) is in use.*choose other ports with --port"
        ):
            bring_up(instance, up_options(port=port, scheduler_port=0, executor_port=0), recorder)
    assert recorder.stages == []
    assert not instance.folder.exists()


@pytest.mark.parametrize("host", ["::1", "::"])
def test_the_public_service_may_listen_on_ipv6(
    instance: Instance, up_options: MakeOptions, tmp_path: Path, host: str
) -> None:
    state = bring_up(instance, up_options(host=host), Recorder())
    assert state.public_address.startswith("[::1]:")
    assert healthy_status(instance).address == state.public_address
    with socket.socket(socket.AF_INET6) as taken:
        taken.bind(("::1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(LauncherError, match=rf"port {port} \(tokenizer\) is in use"):
            bring_up(Instance(tmp_path, "other"), up_options(host=host, port=port, scheduler_port=0), Recorder())


def test_redis_of_the_user_is_checked_and_left_running(
    instance: Instance, up_options: MakeOptions, tmp_path: Path
) -> None:
    said = r"REDIS_URL: redis://\*\*\*@127\.0\.0\.1:1/0 cannot be used: Redis cannot be reached: .* REDIS_URL"
    with pytest.raises(LauncherError, match=said):
        bring_up(instance, up_options(redis_url="redis://:secret@127.0.0.1:1/0"), Recorder())

    owner = Instance(tmp_path, "owner")
    url = bring_up(owner, up_options(), Recorder()).redis_url
    try:
        state = bring_up(instance, up_options(redis_url=url), Recorder())
        assert state.of_kind("redis") == ()
        healthy_status(instance)
        down(instance)
        with redis.Redis.from_url(url) as client:
            assert client.ping()
    finally:
        down(owner)


def test_long_home_still_gets_a_socket(up_options: MakeOptions, tmp_path: Path) -> None:
    instance = Instance(tmp_path / ("x" * 120))
    state = bring_up(instance, up_options(), Recorder())
    assert Path(state.scratch).is_dir()
    down(instance)
    assert not Path(state.scratch).exists()


def _until(condition: Callable[[], bool], limit: float = PATIENCE) -> None:
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
