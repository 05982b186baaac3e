"""The parent and its workers: one port, crashes, drain, and nothing left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

import grpc
import psutil
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2

from scalellm.services.common.json_lines import write_line
from scalellm.services.tokenizer.config import TokenizerSettings
from scalellm.v1 import common_pb2, generation_pb2
from scripted_scheduler import Script, ScriptedScheduler
from service_processes import PATIENCE, eventually


def request(max_tokens=5):
    return generation_pb2.GenerateRequest(prompt="Hello", sampling=common_pb2.SamplingParams(max_tokens=max_tokens))


def scrape(service) -> dict[str, float]:
    with urllib.request.urlopen(f"http://{service.metrics_address}/metrics", timeout=PATIENCE) as response:
        lines = response.read().decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def check_books(metrics) -> None:
    ended = sum(value for name, value in metrics.items() if name.startswith("scalellm_tokenizer_requests_ended_total"))
    running = metrics["scalellm_tokenizer_requests_running"]
    assert running >= 0
    assert metrics['scalellm_tokenizer_requests_accepted_total{transport="grpc"}'] == ended + running


@pytest_asyncio.fixture(loop_scope="session")
async def own_scheduler():
    scheduler = await ScriptedScheduler().start()
    yield scheduler
    await scheduler.stop()


@pytest.fixture
def start(spawn, own_scheduler, model_dir):
    def start(*flags, wait=True):
        model = str(model_dir("smollm2-135m-instruct"))
        return spawn("tokenizer", "--scheduler", own_scheduler.address, "--model", model, *flags, wait=wait)

    return start


def workers_of(service) -> list[psutil.Process]:
    return [child for child in service.children() if "scalellm.services.tokenizer.worker" in child.cmdline()]


async def clients_of_both(connect, service, scheduler):
    """Clients of two workers, each of which has served one request: the kernel spreads connections as it likes."""
    scheduler.submitted_on.clear()
    clients = []
    while len(clients) < 8 or len(set(scheduler.submitted_on)) < 2:
        clients.append(connect(service.address))
        await clients[-1].generate(request())
    return clients


async def test_workers_share_the_port_and_survive_a_crash(start, own_scheduler, connect):
    service = start("--workers", "2", "--metrics-port", "0")
    await eventually(lambda: len(own_scheduler.links) == 2)
    clients = await clients_of_both(connect, service, own_scheduler)
    check_books(scrape(service))
    await eventually(lambda: scrape(service)["scalellm_generation_tokens_total"] == len(clients) * 5)

    own_scheduler.play = lambda submit: Script(hold_after=1)
    calls = [client.generation.Generate(request(50)) for client in clients]
    await eventually(lambda: own_scheduler.num_running == len(clients))
    metrics = scrape(service)
    check_books(metrics)
    assert metrics["scalellm_tokenizer_requests_running"] == len(clients)
    await eventually(lambda: scrape(service)["scalellm_tokenizer_scheduler_links"] == 2)
    victim = workers_of(service)[0]
    victim.kill()
    await eventually(lambda: own_scheduler.num_running < len(clients))
    for call in calls:
        call.cancel()
    await eventually(lambda: own_scheduler.num_running == 0)
    await eventually(lambda: len(own_scheduler.links) == 2)
    await eventually(lambda: scrape(service)["scalellm_tokenizer_requests_running"] == 0)
    metrics = scrape(service)
    check_books(metrics)
    assert metrics["scalellm_tokenizer_worker_crashes_total"] == 1
    assert (
        metrics['scalellm_tokenizer_requests_ended_total{code="UNAVAILABLE",outcome="rejected",transport="grpc"}'] > 0
    )
    assert victim.pid not in [worker.pid for worker in workers_of(service)]

    own_scheduler.play = lambda submit: Script()
    fresh = await clients_of_both(connect, service, own_scheduler)
    finished = len(clients) + len(fresh)
    metrics = scrape(service)
    assert metrics['scalellm_request_success_total{finished_reason="length"}'] == finished
    await eventually(lambda: scrape(service)["scalellm_generation_tokens_total"] >= finished * 5)
    assert metrics["scalellm_prompt_tokens_total"] == finished
    assert metrics["scalellm_time_to_first_token_seconds_count"] >= finished

    family = [psutil.Process(service.pid), *service.children()]
    assert service.terminate() == 0
    await eventually(lambda: not any(process.is_running() for process in family))
    assert not service.announce.exists()
    assert metrics_files(family) == []
    for client in (*clients, *fresh):
        await client.channel.close()


def metrics_files(family: list[psutil.Process]) -> list[Path]:
    """Files of these processes; older ones are of processes that were killed and had the same ids."""
    folders = [*Path(tempfile.gettempdir()).glob("scalellm-tokenizer-*")]
    found = [(path, process) for folder in folders for process in family for path in folder.glob(f"*_{process.pid}.db")]
    return [path for path, process in found if path.stat().st_mtime >= process.create_time()]


async def test_worker_that_keeps_crashing_ends_the_service(start, own_scheduler):
    service = start("--workers", "1", "--max-worker-restarts", "1")
    for _ in range(2):
        await eventually(lambda: len(own_scheduler.links) == 1)
        workers_of(service)[0].send_signal(signal.SIGSEGV)
        await eventually(lambda: not own_scheduler.links)
    assert await asyncio.to_thread(service.process.wait, PATIENCE) == 1
    last_line = service.log.read_text().splitlines()[-1]
    assert last_line.startswith("error: worker 0 ended 2 times within a minute, the last time with signal SIGSEGV")


_BREAKS = """
import sys
from scalellm.services.common.metrics import LoopLag
from scalellm.services.tokenizer import worker

async def broken(self):
    raise RuntimeError("broken on purpose")

LoopLag.run = broken
sys.exit(worker.main())
"""


def test_worker_whose_own_task_fails_ends_with_the_error(own_scheduler, model_dir):
    settings = TokenizerSettings(scheduler=own_scheduler.address, model=str(model_dir("smollm2-135m-instruct")))
    assignment = {"settings": settings.model_dump(mode="json"), "port": 0, "http_port": None}
    # Its stdin stays open, since a worker ends when that closes.
    with subprocess.Popen(
        [sys.executable, "-c", _BREAKS], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        write_line(process.stdin, assignment)
        told = process.stderr.read().decode()
        assert process.wait(PATIENCE) == 1
    assert "RuntimeError: broken on purpose" in told


async def test_drain_finishes_what_runs_and_refuses_the_rest(start, own_scheduler, connect):
    service = start("--workers", "1", "--drain-limit-s", str(PATIENCE))
    client = connect(service.address)
    await client.wait_serving()
    go = asyncio.Event()
    own_scheduler.play = lambda submit: Script(go=go)
    running = asyncio.create_task(client.generate(request(30)))
    await eventually(lambda: own_scheduler.num_running == 1)
    service.process.terminate()
    async with asyncio.timeout(PATIENCE):
        async for answer in client.health.Watch(health_pb2.HealthCheckRequest()):
            if answer.status == health_pb2.HealthCheckResponse.NOT_SERVING:
                break
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await client.generate(request())
    assert error.value.code() is grpc.StatusCode.UNAVAILABLE
    assert error.value.details() == "the service is shutting down"
    go.set()
    assert (await running).finished.usage.completion_tokens == 30
    assert await asyncio.to_thread(service.process.wait, PATIENCE) == 0
    await client.channel.close()


async def test_drain_has_a_limit(start, own_scheduler, connect):
    service = start("--workers", "1", "--drain-limit-s", "0.2")
    client = connect(service.address)
    await client.wait_serving()
    own_scheduler.play = lambda submit: Script(hold_after=1)
    call = client.generation.Generate(request(30))
    await eventually(lambda: own_scheduler.num_running == 1)
    service.process.terminate()
    with pytest.raises(grpc.aio.AioRpcError) as error:
        async for _ in call:
            pass
    assert error.value.code() is grpc.StatusCode.UNAVAILABLE
    assert error.value.details() == "the server is shutting down"
    assert await asyncio.to_thread(service.process.wait, PATIENCE) == 0
    await eventually(lambda: own_scheduler.num_running == 0)
    await client.channel.close()


async def test_workers_do_not_outlive_their_parent(start, own_scheduler):
    service = start("--workers", "1")
    await eventually(lambda: len(own_scheduler.links) == 1)
    family = service.children()
    assert len(family) >= 2  # a worker and its template renderer
    os.kill(service.pid, signal.SIGKILL)
    await eventually(lambda: not any(process.is_running() for process in family))


async def test_taken_port_is_refused(start, own_scheduler, connect):
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        service = start("--port", str(port), wait=False)
        assert await asyncio.to_thread(service.process.wait, PATIENCE) == 1
    assert service.log.read_text().startswith(f"error: cannot listen on 127.0.0.1:{port}: the port is in use")
    assert len(service.log.read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--model", "no-such-model"), "error: --model: no model 'no-such-model'"),
        (("--metrics-port", "1"), "error: cannot listen on 127.0.0.1:1 for metrics"),
        (("--redis-url", "nowhere"), "error: --redis-url: must be redis://user:password@host:port/db"),
    ],
)
async def test_bad_settings_are_one_line(start, own_scheduler, flags, message):
    if flags[0] == "--metrics-port":
        taken = socket.create_server(("127.0.0.1", 0))
        flags = ("--metrics-port", str(taken.getsockname()[1]))
        message = message.replace(":1 ", f":{flags[1]} ")
    service = start(*flags, wait=False)
    assert await asyncio.to_thread(service.process.wait, PATIENCE) in (1, 2)
    assert service.log.read_text().startswith(message)
    assert len(service.log.read_text().splitlines()) == 1


async def test_each_setting_that_is_no_value_is_one_line(start):
    service = start("--scheduler", "nowhere", "--session-ttl-s", "inf", "--log-level", "loud", wait=False)
    assert await asyncio.to_thread(service.process.wait, PATIENCE) == 2
    for line, told in zip(
        sorted(service.log.read_text().splitlines()),
        (
            "error: --log-level (SCALELLM_TOKENIZER_LOG_LEVEL): Input should be 'debug', 'info'",
            "error: --scheduler (SCALELLM_TOKENIZER_SCHEDULER): Value error, 'nowhere' is not host:port",
            "error: --session-ttl-s (SCALELLM_TOKENIZER_SESSION_TTL_S): Input should be less",
        ),
        strict=True,
    ):
        assert line.startswith(told)


async def test_model_without_tokenizer_is_one_line(start, own_scheduler, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    service = start("--model", str(tmp_path), wait=False)
    assert await asyncio.to_thread(service.process.wait, PATIENCE) == 1
    assert service.log.read_text() == f"error: --model: {tmp_path} holds neither a tokenizer.json nor a .gguf file\n"
