"""Defaults of `scalellm up` for an operator who configured nothing: real services with the scripted engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil
import pytest

from installed_cli import Cli
from scalellm.v1 import executor_pb2, executor_pb2_grpc, scheduler_pb2, scheduler_pb2_grpc
from service_processes import PATIENCE

SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "planted-1",
    "HF_TOKEN": "planted-2",
    "DATABASE_URL": "postgres://user:planted-3@host",
    "SCALELLM_API_KEY": "planted-4",
    "SCALELLM_TOKENIZER_SALT_SECRET": "planted-5",
}


@dataclass(frozen=True)
class Line:
    """A running line: how to use it, and its processes by kind of service."""

    cli: Cli
    folder: Path
    processes: dict[str, psutil.Process]
    addresses: dict[str, str]


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory, model_dir) -> Iterator[Line]:
    home = tmp_path_factory.mktemp("home")
    cli = Cli(home, **SECRETS)
    code, _, err = cli.run(
        "up", "--port", "0", "--executor", "fake", "--model", str(model_dir("smollm2-135m-instruct"))
    )
    assert code == 0, err
    try:
        code, out, err = cli.run("status", "--json")
        assert code == 0, out + err
        services = {service["kind"]: service for service in json.loads(out)["services"]}
        processes = {kind: psutil.Process(service["pid"]) for kind, service in services.items()}
        yield Line(
            cli, home / "run" / "default", processes, {kind: service["address"] for kind, service in services.items()}
        )
    finally:
        code, _, err = cli.run("down")
    assert code == 0, err
    assert not (home / "run" / "default").exists()


def state_of(address: str, *metadata: tuple[str, str]) -> scheduler_pb2.GetStateResponse:
    with grpc.insecure_channel(address) as channel:
        stub = scheduler_pb2_grpc.SchedulerStub(channel)
        return stub.GetState(scheduler_pb2.GetStateRequest(), timeout=PATIENCE, metadata=metadata)


def test_nobody_operates_the_line_without_its_token(line: Line) -> None:
    address = line.addresses["scheduler"]
    with pytest.raises(grpc.RpcError) as refused:
        state_of(address)
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert refused.value.details().startswith("authorization: is missing; ")
    with grpc.insecure_channel(line.addresses["executor"]) as channel:
        stub = executor_pb2_grpc.ExecutorStub(channel)
        with pytest.raises(grpc.RpcError) as refused:
            stub.GetInfo(executor_pb2.GetExecutorInfoRequest(), timeout=PATIENCE)
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
    file = line.folder / "link.token"
    assert file.stat().st_mode & 0o777 == 0o600
    assert len(state_of(address, ("authorization", f"Bearer {file.read_text().strip()}")).executors) == 1
    code, out, err = line.cli.run("generate", "Hello", "--max-tokens", "2")
    assert (code, bool(out.strip())) == (0, True), err


def test_no_child_has_a_secret_in_its_environment(line: Line) -> None:
    def environment(process: psutil.Process) -> str:
        return Path(f"/proc/{process.pid}/environ").read_text()

    children = {kind: process.children(recursive=True) for kind, process in line.processes.items()}
    assert len(children["executor"]) >= 1, "the engine"
    assert len(children["tokenizer"]) >= 1, "the worker"
    for process in [child for family in children.values() for child in family]:
        assert "planted" not in environment(process), process.cmdline()
        assert "REDIS_URL" not in environment(process), process.cmdline()
    for kind in ("redis", "executor", "scheduler"):
        assert "planted" not in environment(line.processes[kind]), kind
    assert environment(line.processes["tokenizer"]).count("planted") == 1, "its own salt"
    assert "REDIS_URL" not in environment(line.processes["executor"])
