"""The supervisor with real processes: the embedded redis-server, and fakes of the services, killed in every way."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import redis

from scalellm.launcher import Instance, LauncherError, UpOptions, bring_down, bring_up
from scalellm.launcher.supervision import stand_down
from supervised import Silent, kill, kill_supervisor, pids, processes_of, state_of, status_when, until, until_written

MakeOptions = Callable[..., UpOptions]


def test_what_dies_comes_back_where_it_was(instance: Instance, up_options: MakeOptions) -> None:
    before = bring_up(instance, up_options(), Silent())
    names = list(pids(before))
    with redis.Redis.from_url(before.redis_url) as client:
        client.set("turn", "first")
    until_written(before.redis_url)
    for name in names:
        log = Path(before.service(name).log)
        with log.open("a") as stream:
            stream.write("a line of its first life\n")
        dead = kill(instance, name)
        until(lambda name=name, dead=dead: state_of(instance).service(name).pid != dead)
        assert "a line of its first life\n" in log.read_text()
    status = status_when(instance, lambda status: status.healthy)
    after = state_of(instance)
    assert status.supervised
    assert after.supervisor == before.supervisor
    for service in status.services:
        assert service.address == before.service(service.name).address
        assert (service.restarts.count, service.restarts.last_reason) == (1, "signal SIGKILL")
    with redis.Redis.from_url(after.redis_url) as client:
        assert client.get("turn") == b"first"
    said = instance.log_file("supervisor").read_text()
    for name in names:
        assert f"{name} ended with signal SIGKILL" in said

    result = bring_down(instance, lambda name: None)
    assert sorted(result.restarted) == sorted(names)
    assert (result.crashed, result.killed) == ((), ())
    assert processes_of(instance.folder) == []
    assert sorted(path.name for path in instance.folder.iterdir()) == ["logs"]


def test_what_keeps_crashing_is_given_up_and_up_tries_again(
    instance: Instance, up_options: MakeOptions, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    model.touch()
    options = up_options({"executor": "model"}, models={"fake": model}, max_restarts=1)
    before = bring_up(instance, options, Silent())
    model.unlink()
    kill(instance, "executor-0")
    status = status_when(instance, lambda status: status.services[1].health == "given up")
    executor = status.services[1]
    assert not status.healthy
    assert status.supervised
    assert executor.restarts.count == 1
    assert executor.last_error.startswith(
        "it ended 2 times within 10 minutes; the last time, executor-0 ended with exit "
    )
    assert ": no room for the weights; give it more memory (log: " in executor.last_error
    assert executor.last_error.endswith("try again with: scalellm up")

    # The others are kept running all the same, also after an `up` that did not help.
    with pytest.raises(LauncherError, match="executor-0 ended with exit code 1: no room for the weights"):
        bring_up(instance, options, Silent())
    dead = kill(instance, "scheduler")
    until(lambda: state_of(instance).service("scheduler").pid != dead)
    assert state_of(instance).service("executor-0").given_up

    model.touch()
    running = pids(state_of(instance))
    bring_up(instance, options, Silent())
    status = status_when(instance, lambda status: status.healthy)
    after = pids(state_of(instance))
    assert {name for name in after if after[name] != running[name]} == {"executor-0"}
    assert status.services[1].address == before.service("executor-0").address


def test_services_outlive_their_supervisor_and_up_takes_them_over(instance: Instance, up_options: MakeOptions) -> None:
    before = bring_up(instance, up_options(), Silent())
    kill_supervisor(instance)
    status = status_when(instance, lambda status: status.healthy)
    assert not status.supervised
    dead = kill(instance, "scheduler")
    # For a moment it may be there and not answer.
    status_when(instance, lambda status: status.services[2].health == "crashed")
    assert state_of(instance).service("scheduler").pid == dead

    with pytest.raises(LauncherError, match=r"with other options \(executors 1, not 2\): give the same ones"):
        bring_up(instance, up_options(executors=2), Silent())
    with pytest.raises(LauncherError, match=r"\(redis_url '', not redis://\*\*\*@127\.0\.0\.1:1/0\)"):
        bring_up(instance, up_options(redis_url="redis://:secret@127.0.0.1:1/0"), Silent())
    after = bring_up(instance, up_options(), Silent())
    assert {name for name, pid in pids(after).items() if pid != pids(before)[name]} == {"scheduler"}
    assert [service.address for service in after.services] == [service.address for service in before.services]
    # What it took over it keeps running, too.
    dead = kill(instance, "tokenizer")
    until(lambda: state_of(instance).service("tokenizer").pid != dead)
    assert status_when(instance, lambda status: status.healthy).supervised


def test_down_while_things_crash_leaves_nothing(
    instance: Instance, up_options: MakeOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    bring_up(instance, up_options(), Silent())
    for name in ("scheduler", "executor-0", "redis"):
        kill(instance, name)
    bring_down(instance, lambda name: None)
    assert instance.load() is None
    assert processes_of(instance.folder) == []

    # Nor does a supervisor that does not answer keep anything running; it is not waited for here as long as elsewhere.
    monkeypatch.setattr("scalellm.launcher.down.stand_down", partial(stand_down, limit=0.5))
    state = bring_up(instance, up_options(), Silent())
    assert state.supervisor is not None
    os.kill(state.supervisor.pid, signal.SIGSTOP)
    kill(instance, "scheduler")
    bring_down(instance, lambda name: None)
    assert processes_of(instance.folder) == []


def test_a_supervisor_killed_at_the_start_is_cleared_away(instance: Instance, up_options: MakeOptions) -> None:
    class Killer(Silent):
        def begin(self, stage: str, detail: str) -> None:
            if stage == "scheduler":
                kill_supervisor(instance)

    with pytest.raises(LauncherError, match=r"the supervisor ended with signal SIGKILL; .* scalellm down"):
        bring_up(instance, up_options(), Killer())
    bring_down(instance, lambda name: None)
    assert processes_of(instance.folder) == []
