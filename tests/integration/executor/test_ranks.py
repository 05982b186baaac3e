"""An executor of three ranks on CPUs: it answers as one rank does, and a rank that ends or hangs ends the group."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import psutil
import pytest

from engine_alone import answers_alone
from scalellm.services.common.errors import StatusError
from scalellm.services.common.link import API_MINOR
from scalellm.services.executor.config import ExecutorSettings
from scalellm.services.executor.engine import SamplingParams
from scalellm.services.executor.engine_supervisor import EngineEnd, EngineSupervisor
from scalellm.v1 import common_pb2, link_pb2
from service_processes import eventually

pytestmark = pytest.mark.slow  # three processes load torch, and then three more

PROMPT = [1, 504, 3575, 282, 4649, 314]


class Port:
    """One link of the engine, and what came by it."""

    def __init__(self) -> None:
        self.welcome: link_pb2.Welcome | None = None
        self.token_ids: list[int] = []
        self.finished = False
        self.error: StatusError | None = None

    def on_welcome(self, frame: bytes) -> None:
        self.welcome = link_pb2.ServerFrame.FromString(frame).welcome

    def on_frame(self, frame: bytes) -> None:
        step = link_pb2.ServerFrame.FromString(frame).step
        self.token_ids += step.token_ids
        self.finished = self.finished or bool(step.finished)

    def on_end(self, error: StatusError) -> None:
        self.error = error


def settings(model: Path, num_ranks: int) -> ExecutorSettings:
    return ExecutorSettings(
        model=str(model),
        device="cpu",
        kernels={"all": "torch"},  # type: ignore[arg-type]
        num_threads=1,
        max_model_len=2048,
        num_blocks=130,
        stall_limit_s=5.0,
        tensor_parallel=num_ranks,
    )


@asynccontextmanager
async def running(model: Path) -> AsyncIterator[EngineSupervisor]:
    supervisor = EngineSupervisor(settings(model, 3))
    task = asyncio.create_task(supervisor.run(lambda: None))
    try:
        await ready(supervisor, task)
        yield supervisor
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def ready(supervisor: EngineSupervisor, task: asyncio.Task[None] | None = None) -> None:
    await eventually(lambda: supervisor.is_ready or (task is not None and task.done()))
    if task is not None and task.done():
        task.result()


async def submit(supervisor: EngineSupervisor, max_tokens: int) -> Port:
    port = Port()
    hello = link_pb2.ClientFrame(hello=link_pb2.Hello(api_minor=API_MINOR))
    link = await supervisor.open_link(hello.SerializeToString(), port)
    await eventually(lambda: port.welcome is not None)
    sampling = common_pb2.SamplingParams(max_tokens=max_tokens, ignore_eos=True, temperature=0)
    frame = link_pb2.ClientFrame(submit=link_pb2.Submit(handle=1, token_ids=PROMPT, sampling=sampling))
    supervisor.send_frame(link, frame.SerializeToString())
    return port


def alone(model: Path, max_tokens: int) -> list[int]:
    """The answer of one rank, in this process."""
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True, temperature=0)
    return answers_alone(settings(model, 1), [(PROMPT, sampling)])[0][0]


async def answers(supervisor: EngineSupervisor, expected: list[int]) -> None:
    port = await submit(supervisor, len(expected))
    await eventually(lambda: port.finished)
    assert port.token_ids == expected
    assert port.welcome is not None
    assert (port.welcome.tensor_parallel, port.welcome.devices) == (3, 3)


async def is_replaced(supervisor: EngineSupervisor, port: Port, first: str, pids: set[int]) -> None:
    """The link ends in a way that moves its requests, no process of the group is left, and a new group serves."""
    await eventually(lambda: port.error is not None)
    assert port.error is not None
    assert port.error.code is grpc.StatusCode.UNAVAILABLE
    assert port.error.retry_after is not None
    await ready(supervisor)
    assert supervisor.info.instance_id not in ("", first)
    assert not [pid for pid in pids if psutil.pid_exists(pid)]


def processes(supervisor: EngineSupervisor) -> set[int]:
    assert supervisor.engine_pid is not None
    return {supervisor.engine_pid, *supervisor.rank_pids.values()}


async def test_a_rank_that_is_killed_is_the_end_of_the_group(shallow_model: Path, caplog) -> None:
    caplog.set_level(logging.ERROR)
    expected = alone(shallow_model, 24)
    async with running(shallow_model) as supervisor:
        assert supervisor.info.tensor_parallel == 3
        assert set(supervisor.rank_pids) == {1, 2}
        await answers(supervisor, expected)
        first, pids = supervisor.info.instance_id, processes(supervisor)
        port = await submit(supervisor, 1900)
        await eventually(lambda: bool(port.token_ids))
        os.kill(supervisor.rank_pids[1], signal.SIGKILL)
        await is_replaced(supervisor, port, first, pids)
        assert supervisor.engine_ends[EngineEnd.CRASH] == 1
        await answers(supervisor, expected)
        pids = processes(supervisor)
    assert not [pid for pid in pids if psutil.pid_exists(pid)]
    assert "signal SIGKILL" in caplog.text or "the engine process ended" in caplog.text


async def test_a_rank_that_is_stopped_is_a_stall(shallow_model: Path, caplog) -> None:
    caplog.set_level(logging.ERROR)
    async with running(shallow_model) as supervisor:
        first, pids = supervisor.info.instance_id, processes(supervisor)
        port = await submit(supervisor, 1900)
        await eventually(lambda: bool(port.token_ids))
        os.kill(supervisor.rank_pids[2], signal.SIGSTOP)
        await is_replaced(supervisor, port, first, pids)
        assert supervisor.engine_ends[EngineEnd.STALL] >= 1
    assert "has taken no step for 5 s" in caplog.text
    assert "rank 2:" in caplog.text
    assert "it was stopped by a signal" in caplog.text
