"""An engine that hangs, or that loses its device: why is logged, it is ended, another one comes."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest

from scalellm.services.common.errors import StatusError
from scalellm.services.common.link import API_MINOR
from scalellm.services.executor.config import ExecutorSettings
from scalellm.services.executor.engine_supervisor import EngineEnd, EngineSupervisor
from scalellm.v1 import common_pb2, link_pb2
from service_processes import PATIENCE, ROOT, eventually

POISON = 666
"""The token on which the engine ends."""

# An interpreter whose engine does something else on the token.
INTERPRETER = f"""#!{sys.executable}
import ctypes, runpy, sys
sys.path[:0] = [{str(ROOT)!r}]
from scalellm.services.executor.engine import FakeModelRunner
launch = FakeModelRunner.launch
def launch_or_end(self, batch):
    if any({POISON} in scheduled.seq.token_ids for scheduled in batch.sequences):
        end_on_poison(self)
    return launch(self, batch)
FakeModelRunner.launch = launch_or_end
%s
sys.argv = sys.argv[2:]
runpy.run_module("scalellm.services.executor.engine_process", run_name="__main__", alter_sys=True)
"""

# It sleeps within a call of the C library, with the interpreter's lock held.
HANGS = """
def end_on_poison(runner):
    while True:
        ctypes.PyDLL(None).sleep(3600)  # a signal interrupts it
"""

# As CUDA does: the step fails, and from then on everything else with the same error.
LOSES_ITS_DEVICE = """
def end_on_poison(runner):
    def lost():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    runner.check_device = lost
    lost()
"""


class Port:
    """One link of the engine, and what came by it."""

    def __init__(self) -> None:
        self.welcomed = asyncio.Event()
        self.finished: dict[int, link_pb2.Finish] = {}
        self.num_tokens = 0
        self.error: StatusError | None = None

    def on_welcome(self, frame: bytes) -> None:
        self.welcomed.set()

    def on_frame(self, frame: bytes) -> None:
        step = link_pb2.ServerFrame.FromString(frame).step
        self.num_tokens += len(step.token_ids)
        self.finished |= {finish.handle: finish for finish in step.finished}

    def on_end(self, error: StatusError) -> None:
        self.error = error


@asynccontextmanager
async def running(model: Path) -> AsyncIterator[EngineSupervisor]:
    settings = ExecutorSettings(
        engine="fake",
        fake_preset="h200-llama-8b",
        model=str(model),
        max_model_len=512,
        num_blocks=256,
        stall_limit_s=3.0,
    )
    supervisor = EngineSupervisor(settings)
    task = asyncio.create_task(supervisor.run(lambda: None))
    try:
        await eventually(lambda: supervisor.is_ready)
        yield supervisor
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def submit(supervisor: EngineSupervisor, token: int, max_tokens: int = 400) -> Port:
    port = Port()
    hello = link_pb2.ClientFrame(hello=link_pb2.Hello(api_minor=API_MINOR))
    link = await supervisor.open_link(hello.SerializeToString(), port)
    await asyncio.wait_for(port.welcomed.wait(), PATIENCE)
    sampling = common_pb2.SamplingParams(max_tokens=max_tokens, ignore_eos=True, temperature=0)
    frame = link_pb2.ClientFrame(submit=link_pb2.Submit(handle=1, token_ids=[token], sampling=sampling))
    supervisor.send_frame(link, frame.SerializeToString())
    return port


def use_engine(behaviour: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines that start from now on do this on the token."""
    interpreter = tmp_path / "python"
    interpreter.write_text(INTERPRETER % behaviour)
    interpreter.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(interpreter))


async def is_replaced(supervisor: EngineSupervisor, port: Port, first: str, end: EngineEnd) -> None:
    await eventually(lambda: port.error is not None)
    assert port.error.code is grpc.StatusCode.UNAVAILABLE
    assert port.error.retry_after is not None  # which says that it will be back
    await eventually(lambda: supervisor.is_ready)
    assert supervisor.info.instance_id not in ("", first)
    assert supervisor.engine_ends[end] >= 1  # a busy machine may hold another one up, which is then a stall, too
    assert supervisor.engine_ends[EngineEnd.CRASH] == (end is EngineEnd.CRASH)
    later = await submit(supervisor, 5, max_tokens=3)
    await eventually(lambda: 1 in later.finished)
    assert later.finished[1].status.code == 0


async def test_an_engine_that_hangs_in_native_code_says_where_and_is_replaced(
    model_dir, tmp_path, monkeypatch, caplog
) -> None:
    use_engine(HANGS, tmp_path, monkeypatch)
    caplog.set_level(logging.ERROR)
    async with running(model_dir("smollm2-135m-instruct")) as supervisor:
        first = supervisor.info.instance_id
        port = await submit(supervisor, POISON)
        await is_replaced(supervisor, port, first, EngineEnd.STALL)
    assert "has taken no step for 3 s" in caplog.text
    assert "in end_on_poison" in caplog.text
    assert "engine_process.py" in caplog.text
    assert ": waiting" in caplog.text  # what the kernel says of the thread


async def test_an_engine_that_loses_its_device_ends_no_request_and_is_replaced(
    model_dir, tmp_path, monkeypatch, caplog, capfd
) -> None:
    use_engine(LOSES_ITS_DEVICE, tmp_path, monkeypatch)
    async with running(model_dir("smollm2-135m-instruct")) as supervisor:
        first = supervisor.info.instance_id
        other = await submit(supervisor, 5)
        await eventually(lambda: other.num_tokens > 0)
        port = await submit(supervisor, POISON)
        await is_replaced(supervisor, port, first, EngineEnd.CRASH)
        assert other.error is not None
        assert not port.finished
    assert "the engine process ended with exit code 1" in caplog.text
    said = capfd.readouterr().err
    assert "the device is lost" in said
    assert "an illegal memory access was encountered" in said


async def test_a_stopped_engine_is_unhealthy_and_replaced(model_dir, caplog) -> None:
    caplog.set_level(logging.ERROR)
    async with running(model_dir("smollm2-135m-instruct")) as supervisor:
        first = supervisor.info.instance_id
        port = await submit(supervisor, 5)
        await eventually(lambda: port.num_tokens > 0)
        assert supervisor.engine_pid is not None
        os.kill(supervisor.engine_pid, signal.SIGSTOP)
        await eventually(lambda: not supervisor.is_ready)
        await is_replaced(supervisor, port, first, EngineEnd.STALL)
    assert "its stacks are not known: it was stopped by a signal" in caplog.text
