"""The whole line over IPv6: every service, every link, the metrics, the health checks and every client."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from bench.load.grpc_target import GrpcTarget
from bench.services.neighbours import h2
from line import Line, generate, scrape, start_line
from scalellm.client import Client
from scalellm.services.common.health_check import main as health_check
from scalellm.v1 import generation_pb2
from service_processes import PATIENCE, Spawn

FAKE = ("--engine", "fake", "--fake-preset", "h200-llama-8b")
METRICS = ("--metrics-host", "::1")


@pytest.fixture(scope="module")
def line(module_spawn: Spawn, module_redis, model_dir) -> Iterator[Line]:
    """Within, everything is on ::1, one host with brackets; clients find both families."""
    return start_line(
        module_spawn,
        module_redis,
        model_dir("smollm2-135m-instruct"),
        executors=((*FAKE, "--host", "[::1]", *METRICS),),
        scheduler=("--host", "::1", *METRICS),
        tokenizer=("--host", "::", "--metrics-host", "::", "--workers", "2"),
    )


def cli(*arguments: str, **variables: str) -> str:
    command = [sys.executable, "-m", "scalellm.cli.main", *arguments]
    environment = {**os.environ, **variables}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


async def test_requests_come_through_whichever_family_the_client_takes(line: Line) -> None:
    assert line.address.startswith("[::]:")
    port = line.address.rpartition(":")[2]
    request = generation_pb2.GenerateRequest(prompt="One", sampling={"max_tokens": 4, "ignore_eos": True})
    for host in ("127.0.0.1", "[::1]"):
        async with grpc.aio.insecure_channel(f"{host}:{port}") as channel:
            answer = await generate(channel, request, timeout=PATIENCE)
        assert answer.code is grpc.StatusCode.OK, answer.details
        assert answer.finished.latency.executor_id.startswith("[::1]:")
    state = await line.scheduler_state()
    assert {executor.address for executor in state.executors} == {executor.address for executor in line.executors}


def test_metrics_and_health(line: Line, capsys: pytest.CaptureFixture[str]) -> None:
    for service in (line.tokenizer, line.scheduler, *line.executors):
        assert service.metrics_address.startswith("[::")
        assert scrape(service)['scalellm_process_open_fds{process="main"}'] > 0
        address = service.address.replace("[::]", "[::1]")
        assert health_check(address, {}) == 0
        assert capsys.readouterr().out == f"{address}: serving\n"


def test_the_command_line(line: Line, tmp_path: Path) -> None:
    address = line.address.replace("[::]", "[::1]")
    variables = {"SCALELLM_HOME": str(tmp_path), "SCALELLM_ADDRESS": address}
    answer = json.loads(cli("generate", "One", "--max-tokens", "4", "--json", **variables).splitlines()[-1])
    assert answer
    metrics = [service.metrics_address.replace("[::]", "[::1]") for service in (line.tokenizer, line.scheduler)]
    shown = cli("top", "--once", "--metrics", metrics[0], "--metrics", metrics[1], **variables)
    assert all(address in shown for address in metrics)
    with Client(address) as client:
        assert client.info().model == "smollm2-135m-instruct"


async def test_the_load_generator(line: Line) -> None:
    address = line.address.replace("[::]", "[::1]")
    target = GrpcTarget(address)
    assert (await target.info()).model == "smollm2-135m-instruct"
    await target.close()
    connection = await h2.connect(address)
    connection.close()
