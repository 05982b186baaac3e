"""An engine that hangs: its stacks are logged, it is ended, another one comes."""

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

from scalellm.v1 import common_pb2, link_pb2
from service_processes import PATIENCE, ROOT, eventually
from services.common.errors import StatusError
from services.common.link import API_MINOR
from services.executor.config import ExecutorSettings
from services.executor.engine_supervisor import EngineEnd, EngineSupervisor

POISON = 666
"""The token on which the engine hangs."""

# An interpreter whose engine sleeps within a call of the C library, with the interpreter's lock held.
HANGING = f"""#!{sys.executable}
import ctypes, runpy, sys
sys.path[:0] = [{str(ROOT)!r}]
from services.executor.engine import FakeModelRunner
launch = FakeModelRunner.launch
def hang_on_poison(self, batch):
    if any({POISON} in scheduled.seq.token_ids for scheduled in batch.sequences):
        while True:
            ctypes.PyDLL(None).sleep(3600)  # a signal interrupts it
    return launch(self, batch)
FakeModelRunner.launch = hang_on_poison
sys.argv = sys.argv[2:]
runpy.run_module("services.executor.engine_process", run_name="__main__", alter_sys=True)
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


async def is_replaced(supervisor: EngineSupervisor, port: Port, first: str) -> None:
    await eventually(lambda: port.error is not None)
    assert port.error.code is grpc.StatusCode.UNAVAILABLE
    await eventually(lambda: supervisor.is_ready)
    assert supervisor.info.instance_id not in ("", first)
    assert supervisor.engine_ends[EngineEnd.STALL] >= 1  # a busy machine may hold another one up
    assert supervisor.engine_ends[EngineEnd.CRASH] == 0
    later = await submit(supervisor, 5, max_tokens=3)
    await eventually(lambda: 1 in later.finished)
    assert later.finished[1].status.code == 0


async def test_an_engine_that_hangs_in_native_code_says_where_and_is_replaced(
    model_dir, tmp_path, monkeypatch, caplog
) -> None:
    interpreter = tmp_path / "python"
    interpreter.write_text(HANGING)
    interpreter.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(interpreter))
    caplog.set_level(logging.ERROR)
    async with running(model_dir("smollm2-135m-instruct")) as supervisor:
        first = supervisor.info.instance_id
        port = await submit(supervisor, POISON)
        await is_replaced(supervisor, port, first)
    assert "has taken no step for 3 s" in caplog.text
    assert "in hang_on_poison" in caplog.text
    assert "engine_process.py" in caplog.text
    assert ": waiting" in caplog.text  # what the kernel says of the thread


async def test_a_stopped_engine_is_unhealthy_and_replaced(model_dir, caplog) -> None:
    caplog.set_level(logging.ERROR)
    async with running(model_dir("smollm2-135m-instruct")) as supervisor:
        first = supervisor.info.instance_id
        port = await submit(supervisor, 5)
        await eventually(lambda: port.num_tokens > 0)
        assert supervisor.engine_pid is not None
        os.kill(supervisor.engine_pid, signal.SIGSTOP)
        await eventually(lambda: not supervisor.is_ready)
        await is_replaced(supervisor, port, first)
    assert "its stacks are not known: it was stopped by a signal" in caplog.text
