"""`docker compose up` as a user meets it: from nothing to an answer, scaled, crashed, upgraded, and gone again.

The tests share one project and run in this order.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc
import pytest

from compose_stack import ROOT, SERVICES, ComposeStack, crash, inspect, store_figures
from line import Answer, generate
from scalellm.client import Client, ClientError
from scalellm.v1 import common_pb2, generation_pb2

NUM_CLIENTS = 4
OK = grpc.StatusCode.OK

READY_EXECUTORS = """
import grpc
from scalellm.v1 import scheduler_pb2 as pb, scheduler_pb2_grpc
stub = scheduler_pb2_grpc.SchedulerStub(grpc.insecure_channel("127.0.0.1:50052"))
state = stub.GetState(pb.GetStateRequest(), timeout=10)
print(sum(executor.phase == pb.EXECUTOR_PHASE_READY for executor in state.executors))
"""


@pytest.fixture(scope="module")
def stack(figures: list[str]) -> Iterator[ComposeStack]:
    """All services, started where no image of the project existed."""
    stack = ComposeStack()
    figures.append(store_figures())
    try:
        started = time.monotonic()
        stack.compose("build", timeout=1500)
        built = time.monotonic()
        stack.compose("up", "--build", "--wait", "--wait-timeout", "300", timeout=600)
        figures.append(f"build {built - started:.0f} s, up --wait {time.monotonic() - built:.0f} s (with the model)")
        for service, (size, own) in stack.image_sizes().items():
            figures.append(f"image {service:10} {size / 1e6:6.0f} MB, {own / 1e6:6.0f} MB on top of its base")
        yield stack
    finally:
        stack.down()
        stack.remove_images()


def request(number: int = 0, max_tokens: int = 24) -> generation_pb2.GenerateRequest:
    return generation_pb2.GenerateRequest(
        prompt=f"Chapter {number}. Once upon a time",
        sampling=common_pb2.SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True),
        output=generation_pb2.OUTPUT_TEXT_AND_TOKEN_IDS,
    )


def channel(stack: ComposeStack) -> grpc.aio.Channel:
    options = (("grpc.use_local_subchannel_pool", 1), ("grpc.max_reconnect_backoff_ms", 500))
    return grpc.aio.insecure_channel(stack.address, options=options)


@dataclass
class Traffic:
    """Clients that ask one request after the other, and what they got."""

    stack: ComposeStack
    answers: list[Answer] = field(default_factory=list)
    _stopping: asyncio.Event = field(default_factory=asyncio.Event)

    async def client(self, number: int) -> None:
        async with channel(self.stack) as own:
            while not self._stopping.is_set():
                answer = await generate(own, request(number), timeout=120)
                self.answers.append(answer)
                if answer.code is not OK:
                    await asyncio.sleep(0.25)

    def stop(self) -> None:
        self._stopping.set()

    async def more(self, count: int = 2 * NUM_CLIENTS) -> None:
        """Wait for so many more answers."""
        goal = sum(answer.code is OK for answer in self.answers) + count
        async with asyncio.timeout(180):
            while sum(answer.code is OK for answer in self.answers) < goal:
                await asyncio.sleep(0.1)

    def outcome(self) -> str:
        counts = Counter(answer.code.name for answer in self.answers)
        return ", ".join(f"{count} {code}" for code, count in counts.most_common())

    def errors(self) -> set[str]:
        return {f"{answer.code}: {answer.details}" for answer in self.answers if answer.code is not OK}


@asynccontextmanager
async def traffic(stack: ComposeStack) -> AsyncIterator[Traffic]:
    running = Traffic(stack)
    async with asyncio.TaskGroup() as clients:
        for number in range(NUM_CLIENTS):
            clients.create_task(running.client(number))
        try:
            await running.more()
            yield running
            await running.more()
        finally:
            running.stop()


async def compose(stack: ComposeStack, *arguments: str) -> None:
    await asyncio.to_thread(stack.compose, *arguments)


async def build_release(stack: ComposeStack) -> None:
    stack.new_release()
    await compose(stack, "build")


async def wait_ready_executors(stack: ComposeStack, count: int) -> None:
    async with asyncio.timeout(120):
        while True:
            said = await asyncio.to_thread(stack.compose, "exec", "-T", "scheduler", "python", "-c", READY_EXECUTORS)
            if int(said) == count:
                return
            await asyncio.sleep(0.5)


def test_an_answer_through_the_published_port(stack: ComposeStack, figures: list[str]) -> None:
    with Client(stack.address) as client, client.generate(request(max_tokens=32), timeout=60) as stream:
        responses = list(stream)
    kinds = [response.WhichOneof("event") for response in responses]
    assert kinds[0] == "started"
    assert kinds[-1] == "finished"
    assert kinds.count("delta") > 1
    assert responses[-1].finished.usage.completion_tokens == 32


def test_a_session_is_kept(stack: ComposeStack) -> None:
    with Client(stack.address) as client:
        chat = generation_pb2.Chat(messages=[generation_pb2.ChatMessage(role="user", content="Say yes.")])
        turn = generation_pb2.GenerateRequest(chat=chat, session_id="kept", sampling={"max_tokens": 8})
        with client.generate(turn, timeout=60) as stream:
            assert list(stream)[-1].finished.session == generation_pb2.SESSION_OUTCOME_SAVED
        stack.compose("restart", "redis")
        stack.wait_running("redis", 1)
        assert len(client.get_session("kept").messages) == 2


@pytest.mark.parametrize("service", SERVICES)
def test_containers_can_do_little(stack: ComposeStack, service: str) -> None:
    (container,) = stack.containers(service)
    found = inspect(container)
    assert found["HostConfig"]["ReadonlyRootfs"]
    assert found["HostConfig"]["Memory"] > 0
    assert found["HostConfig"]["PidsLimit"] > 0
    assert found["HostConfig"]["LogConfig"] == {"Type": "json-file", "Config": {"max-file": "3", "max-size": "10m"}}
    assert found["HostConfig"]["CapDrop"] == ["ALL"]
    assert "no-new-privileges:true" in found["HostConfig"]["SecurityOpt"]
    assert stack.compose("exec", "-T", service, "id", "-u").strip() != "0"
    reachable = {port: at for port, at in found["NetworkSettings"]["Ports"].items() if at}
    assert list(reachable) == (["50051/tcp", "8000/tcp"] if service == "tokenizer" else [])


@pytest.mark.parametrize("service", ["tokenizer", "scheduler"])
def test_only_the_executor_has_torch(stack: ComposeStack, service: str) -> None:
    look = "import importlib.util as u; print([name for name in ('torch', 'safetensors') if u.find_spec(name)])"
    assert stack.compose("exec", "-T", service, "python", "-c", look).strip() == "[]"


def test_the_executor_runs_kernels_compiled_for_its_cpu(stack: ComposeStack) -> None:
    kernels = stack.compose("exec", "-T", "executor", "ls", "/var/lib/scalellm/kernels")
    assert ".so" in kernels


async def wait_scraped(stack: ComposeStack, executors: int) -> None:
    await asyncio.to_thread(stack.wait_scraped, tokenizer=1, scheduler=1, executor=executors)


async def test_prometheus_finds_all_services(stack: ComposeStack) -> None:
    await asyncio.to_thread(stack.start_prometheus)
    await wait_scraped(stack, executors=1)


async def test_executors_come_and_go_under_traffic(stack: ComposeStack, figures: list[str]) -> None:
    async with traffic(stack) as running:
        started = time.monotonic()
        await compose(stack, "up", "-d", "--no-recreate", "--wait", "--scale", "executor=2")
        await wait_ready_executors(stack, 2)
        figures.append(f"a second executor takes requests after {time.monotonic() - started:.0f} s")
        await running.more()
        await wait_scraped(stack, executors=2)
        await compose(stack, "up", "-d", "--no-recreate", "--scale", "executor=1")
        await wait_ready_executors(stack, 1)
        await wait_scraped(stack, executors=1)
    figures.append(f"executors from 1 to 2 and back: {running.outcome()}")
    assert running.errors() == set()


async def test_an_executor_crashes_mid_stream(stack: ComposeStack, figures: list[str]) -> None:
    await compose(stack, "up", "-d", "--no-recreate", "--wait", "--scale", "executor=2")
    await wait_ready_executors(stack, 2)
    victim = (await asyncio.to_thread(stack.containers, "executor"))[0]
    async with channel(stack) as own:
        answers = [Answer() for _ in range(8)]
        calls = [generate(own, request(n, 800), answer=answer, timeout=180) for n, answer in enumerate(answers)]
        streams = [asyncio.create_task(call) for call in calls]
        async with asyncio.timeout(60):
            while not all(answer.token_ids[0] for answer in answers):
                await asyncio.sleep(0.02)
        assert not any(stream.done() for stream in streams)
        await asyncio.to_thread(crash, victim)
        await asyncio.gather(*streams)
    assert [(answer.code, answer.details) for answer in answers] == [(OK, "")] * 8
    assert all(len(answer.token_ids[0]) == 800 for answer in answers)
    moved = [answer.finished.latency.failover_ns for answer in answers if answer.finished.latency.failover_ns]
    assert moved
    figures.append(f"executor killed: {len(moved)} of 8 streams moved, a pause of {max(moved) / 1e9:.1f} s at most")
    await asyncio.to_thread(stack.wait_running, "executor", 2)  # the restart policy brought it back
    await wait_ready_executors(stack, 2)
    await compose(stack, "up", "-d", "--no-recreate", "--scale", "executor=1")
    await wait_ready_executors(stack, 1)


def test_the_tokenizer_crashes_mid_stream(stack: ComposeStack) -> None:
    (container,) = stack.containers("tokenizer")
    with Client(stack.address) as client, client.generate(request(max_tokens=400), timeout=180) as stream:
        for response in stream:
            if response.WhichOneof("event") == "delta":
                break
        crash(container)
        with pytest.raises(ClientError) as lost:
            list(stream)
    assert lost.value.code is grpc.StatusCode.UNAVAILABLE
    stack.wait_running("tokenizer", 1)
    with Client(stack.address) as client, client.generate(request(), timeout=60) as stream:
        assert list(stream)[-1].finished.usage.completion_tokens == 24


async def test_executors_are_upgraded_without_an_error(stack: ComposeStack, figures: list[str]) -> None:
    (old,) = await asyncio.to_thread(stack.containers, "executor")
    await build_release(stack)
    async with traffic(stack) as running:
        await compose(stack, "up", "-d", "--no-deps", "--no-recreate", "--wait", "--scale", "executor=2", "executor")
        await wait_ready_executors(stack, 2)
        await compose(stack, "up", "-d", "--no-deps", "--scale", "executor=1", "executor")
        await wait_ready_executors(stack, 1)
    (new,) = await asyncio.to_thread(stack.containers, "executor")
    assert new != old
    assert inspect(new)["Config"]["Image"] == stack.image("executor")
    figures.append(f"executor upgraded, one after the other: {running.outcome()}")
    assert running.errors() == set()


@pytest.mark.parametrize("service", ["scheduler", "tokenizer"])
async def test_others_are_upgraded_with_a_pause(stack: ComposeStack, service: str, figures: list[str]) -> None:
    await build_release(stack)
    async with traffic(stack) as running:
        started = time.monotonic()
        await compose(stack, "up", "-d", "--no-deps", "--wait", service)
        took = time.monotonic() - started
    (container,) = await asyncio.to_thread(stack.containers, service)
    assert inspect(container)["Config"]["Image"] == stack.image(service)
    figures.append(f"{service} upgraded in {took:.0f} s: {running.outcome()}")
    # What had begun was finished: nothing was cut off in the middle of an answer. The others were refused, or never
    # connected.
    refused = {(answer.code.name, len(answer.token_ids)) for answer in running.answers if answer.code is not OK}
    assert refused <= {("UNAVAILABLE", 0)}, running.errors()


def test_down_leaves_nothing(stack: ComposeStack, figures: list[str]) -> None:
    exits = {}
    started = time.monotonic()
    containers = {service: stack.containers(service)[0] for service in ("tokenizer", "scheduler", "executor")}
    stack.compose("stop")
    for service, container in containers.items():
        exits[service] = inspect(container)["State"]["ExitCode"]
    stack.down()
    figures.append(f"down {time.monotonic() - started:.0f} s")
    assert exits == {"tokenizer": 0, "scheduler": 0, "executor": 0}
    assert stack.left() == []


def test_profiles_are_valid() -> None:
    command = ["docker", "compose", "--profile", "gpu", "--profile", "monitoring", "config", "--format", "json"]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    gpu = json.loads(done.stdout)["services"]["executor-gpu"]
    (device,) = gpu["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["device_ids"], device["capabilities"]) == ("nvidia", ["0"], ["gpu"])
    assert gpu["networks"]["line"]["aliases"] == ["executor"]  # the scheduler finds it under the other one's name
    arguments = gpu["build"]["args"]
    assert (arguments["TORCH_INDEX"], "@sha256:" in arguments["PYTHON_IMAGE"]) == ("", True)
    assert gpu["environment"]["SCALELLM_EXECUTOR_DEVICE"] == "cuda"
