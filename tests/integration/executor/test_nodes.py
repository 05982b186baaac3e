"""An executor over several hosts: it answers as one rank does, and a host that dies costs a pause."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import grpc
import pytest

from engine_alone import answers_alone
from fault_namespace import Namespace, why_no_namespace
from line import Answer, Line, generate, scrape, start_line
from mixed_load import total
from prompts import PROMPTS
from scalellm.services.executor.config import ExecutorSettings
from scalellm.services.executor.engine import SamplingParams
from scalellm.v1 import common_pb2, generation_pb2
from service_processes import ServiceProcess, Spawn, eventually

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]  # each rank loads torch, and once more in a new generation

NUM_REQUESTS = 16
MAX_TOKENS = 40
TOKENS = [1, 504, 3575, 282, 4649, 314]
COMMON = {
    "device": "cpu", "kernels": "all=torch", "num_threads": "1", "max_model_len": "1024", "num_blocks": "400",
}  # fmt: skip


def request(number: int) -> generation_pb2.GenerateRequest:
    sampling = common_pb2.SamplingParams(
        max_tokens=MAX_TOKENS, temperature=0.8 * (number % 2), seed=number + 1, ignore_eos=True
    )
    asked = generation_pb2.GenerateRequest(
        prompt=PROMPTS[number % len(PROMPTS)], sampling=sampling, output=generation_pb2.OUTPUT_TEXT_AND_TOKEN_IDS
    )
    if number == 0:
        asked.tokens.ids[:] = TOKENS
    return asked


def alone(model: Path) -> list[int]:
    """The answer to request 0 of one rank, in this process."""
    settings = ExecutorSettings(model=str(model), **COMMON)  # type: ignore[arg-type]
    sampling = SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True, temperature=0)
    return answers_alone(settings, [(TOKENS, sampling)])[0][0]


class Hosts:
    """Three nodes with a rank each; the last one has a command of its own."""

    def __init__(self, spawn: Spawn, model: Path, leader: str, *more: str, prefix: Sequence[str] = ()) -> None:
        self._spawn = spawn
        self._prefix = prefix
        common = [word for name, value in COMMON.items() for word in (f"--{name.replace('_', '-')}", value)]
        self.flags = [*common, "--tensor-parallel", "3", "--nodes", "3", "--leader", leader, *more]
        self._model = ("--model", str(model))
        self.first = self.start(1)
        self.last = self.start(2)

    def start(self, node_rank: int) -> ServiceProcess:
        prefix = self._prefix if node_rank == 2 else ()
        return self._spawn(
            "executor", *self._model, *self.flags, "--node-rank", str(node_rank), wait=False, prefix=prefix
        )


async def ask_all(line: Line, seen: Sequence[Answer], when_running: Callable[[], None] = lambda: None) -> None:
    async with line.channel() as channel:
        running = [asyncio.create_task(generate(channel, request(n), answer=one)) for n, one in enumerate(seen)]
        await eventually(lambda: all(one.token_ids for one in seen), timeout=600)
        when_running()
        await asyncio.gather(*running)
    assert {one.code for one in seen} == {grpc.StatusCode.OK}, [one.details for one in seen]


async def check_that_a_lost_node_costs_a_pause(
    spawn: Spawn, redis, model: Path, hosts: Hosts, lose: Callable[[], None], *links: str
) -> None:
    line = start_line(
        *(spawn, redis, model),
        executors=([*hosts.flags, "--max-engine-restarts", "100"],),
        scheduler=("--engine-restart-limit-s", "600", *links),
        tokenizer=("--workers", "1", *links),
    )
    before, after = ([Answer() for _ in range(NUM_REQUESTS)] for _ in range(2))
    await ask_all(line, before)
    assert before[0].token_ids[0] == alone(model)
    await ask_all(line, after, lose)
    assert [one.token_ids for one in after] == [one.token_ids for one in before]
    assert [one.texts for one in after] == [one.texts for one in before]
    assert any(one.finished.latency.failover_ns > 0 for one in after)
    await eventually(lambda: _figure(line, "num_requests_running") == 0)
    assert _figure(line, "kv_cache_free_blocks") == _figure(line, "kv_cache_blocks") > 0
    assert _figure(line, "tensor_parallel") == 3
    assert _figure(line, "engine_crashes_total") > 0
    log = line.executors[0].log.read_text()
    assert "node 2 has left: " in log or "the engine has taken no step" in log
    assert "generation 2-" in log


def _figure(line: Line, name: str) -> float:
    return total(scrape(line.executors[0]), f"scalellm_executor_{name}")


async def test_streams_outlive_a_node(spawn: Spawn, redis, shallow_model: Path) -> None:
    host = ".".join(("127", *(str(1 + secrets.randbelow(254)) for _ in range(3))))
    hosts = Hosts(spawn, shallow_model, f"{host}:50071")

    def kill_and_start() -> None:
        for process in (*hosts.last.children(), hosts.last.process):
            os.kill(process.pid, signal.SIGKILL)
        hosts.last = hosts.start(2)

    await check_that_a_lost_node_costs_a_pause(spawn, redis, shallow_model, hosts, kill_and_start)


async def test_streams_outlive_a_cable(spawn: Spawn, redis, shallow_model: Path, tmp_path: Path) -> None:
    """A node in a network of its own, whose cable is pulled: no connection closes, and it is missed by its silence."""
    if reason := why_no_namespace():
        pytest.skip(reason)
    token = tmp_path / "token"
    token.write_text(secrets.token_hex(32))
    with Namespace() as namespace:
        hosts = Hosts(
            *(spawn, shallow_model, f"{namespace.outside}:50071", "--link-token-file", str(token)),
            *("--stall-limit-s", "20"),
            prefix=namespace.prefix,
        )

        def pull_for_a_while() -> None:
            namespace.pull()
            asyncio.get_running_loop().call_later(30, namespace.mend)

        await check_that_a_lost_node_costs_a_pause(
            *(spawn, redis, shallow_model, hosts, pull_for_a_while), "--link-token-file", str(token)
        )
