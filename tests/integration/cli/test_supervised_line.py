"""The real services under `scalellm up`: whatever is killed comes back, and a conversation goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from installed_cli import Cli
from scalellm.client import Client, ClientError
from scalellm.launcher import Instance
from scalellm.v1.generation_pb2 import Chat, ChatMessage, GenerateRequest
from service_processes import PATIENCE
from supervised import kill, processes_of, state_of, status_when, until, until_written

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cli(tmp_path_factory: pytest.TempPathFactory) -> Cli:
    return Cli(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def instance(cli: Cli, model_dir: Callable[[str], Path]) -> Iterator[Instance]:
    """Brought up by two commands at once, which ignore SIGINT, as those do that a shell starts with `&`."""
    instance = Instance(Path(cli.environment["SCALELLM_HOME"]))
    model = str(model_dir("smollm2-135m-instruct"))
    command = [sys.executable, "-m", "scalellm.cli.main", "up", "--port", "0", "--executor", "fake", "--model", model]
    rivals = [
        subprocess.Popen(
            command,
            env=cli.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
        )
        for _ in range(2)
    ]
    ended = sorted((*rival.communicate(timeout=4 * PATIENCE), rival.returncode) for rival in rivals)
    try:
        (_, refusal, failed), (said, errors, done) = ended
        assert (failed, done) == (1, 0), (refusal, errors)
        assert "another scalellm up" in refusal or "already running at" in refusal
        assert said.startswith("ScaleLLM serves ")
        yield instance
    finally:
        code, _, err = cli.run("down")
    assert code == 0, err
    assert processes_of(instance.folder) == []


def say(address: str, turns: int) -> None:
    """Take the next turn of a conversation that has so many, once the services are ready for it."""

    def is_done() -> bool:
        message = ChatMessage(role="user", content="Go on.")
        request = GenerateRequest(chat=Chat(messages=[message]), session_id="talk")
        request.sampling.max_tokens = 4
        try:
            with Client(address) as client, client.generate(request, timeout=PATIENCE) as stream:
                responses = list(stream)
        except ClientError:
            return False
        assert responses[0].started.session_turns == turns
        assert responses[-1].HasField("finished")
        return True

    until(is_done)


def test_whatever_is_killed_comes_back_and_the_conversation_goes_on(cli: Cli, instance: Instance) -> None:
    state = state_of(instance)
    names = [service.name for service in state.services]
    assert names == ["redis", "executor-0", "scheduler", "tokenizer"]
    say(state.public_address, 0)
    for turns, name in enumerate(names, 1):
        family = psutil.Process(state_of(instance).service(name).pid).children(recursive=True)
        until_written(state.redis_url)  # the session's turn
        dead = kill(instance, name)
        until(lambda name=name, dead=dead: state_of(instance).service(name).pid != dead)
        say(state.public_address, turns)
        until(lambda family=family: not any(child.is_running() for child in family))
    status_when(instance, lambda status: status.healthy)
    code, out, err = cli.run("status", "--json")
    assert code == 0, out + err
    document = json.loads(out)
    assert document["supervised"] is True
    assert [service["restarts"]["count"] for service in document["services"]] == [1] * 4
    assert {service["restarts"]["last_reason"] for service in document["services"]} == {"signal SIGKILL"}
    _, out, _ = cli.run("status")
    assert out.count(": restarted once; it last ended at ") == 4
    _, out, _ = cli.run("top", "--once")
    assert out.count("signal SIGKILL)") == 3
    _, out, _ = cli.run("logs", "--lines", "100000")
    assert {line.split("|")[0].strip() for line in out.splitlines()} == {*names, "supervisor"}
    assert [name for name in names if f"{name} ended with signal SIGKILL" in out] == names
    code, out, _ = cli.run("logs", "executor", "--lines", "1")
    assert (code, out.count("\n"), "|" in out) == (0, 1, False)
    code, _, err = cli.run("logs", "gateway")
    assert (code, err.startswith("error: no service 'gateway' has a log here; there are executor-0, redis, ")) == (
        2,
        True,
    )


def test_nobody_supervises_is_said_and_up_puts_it_right(cli: Cli, instance: Instance) -> None:
    supervisor = state_of(instance).supervisor
    assert supervisor is not None
    os.kill(supervisor.pid, signal.SIGKILL)
    status_when(instance, lambda status: not status.supervised)
    _, _, err = cli.run("status")
    assert "nobody supervises" in err
    ((model, path),) = state_of(instance).asked["models"]
    code, out, err = cli.run("up", "--port", "0", "--executor", "fake", "--model", path)
    assert (code, out.startswith(f"ScaleLLM serves {model} at {state_of(instance).public_address}")) == (
        0,
        True,
    ), err
    assert status_when(instance, lambda status: status.healthy).supervised
