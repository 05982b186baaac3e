"""The composed system under 64 streams: containers are killed, paused and cut off, and services are upgraded.

`make test-compose-faults` runs it. What is promised of each fault is what `fault_promises` has for its processes.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Awaitable, Callable, Iterator

import pytest

from compose_line import EXECUTORS, SCHEDULERS, SERVICES, TOKENIZERS, ComposeLine
from compose_stack import crash, docker
from fault_promises import Fault
from fault_trials import HEADINGS, Tally, Trials
from fault_workload import Workload

SEED = int(os.environ.get("FAULTS_SEED") or 0)
SECONDS = float(os.environ.get("FAULTS_SECONDS") or 3)
_CUT_SECONDS = 25
"""Longer than the limit on silence in faults.yaml."""

Break = Callable[[ComposeLine, str], Awaitable[None]]


async def killed(line: ComposeLine, service: str) -> None:
    """Kill the service as the kernel does when memory runs out; Docker starts it again."""
    await asyncio.to_thread(crash, line.container(service))


async def paused(line: ComposeLine, service: str) -> None:
    """All its processes stand still for some seconds."""
    container = await asyncio.to_thread(line.container, service)
    await asyncio.to_thread(docker, "pause", container)
    await asyncio.sleep(SECONDS)
    await asyncio.to_thread(docker, "unpause", container)


async def cut_off(line: ComposeLine, service: str) -> None:
    """Take the service's network away for longer than the limit on silence; no connection closes."""
    container = await asyncio.to_thread(line.container, service)
    await asyncio.to_thread(docker, "network", "disconnect", "--force", line.network, container)
    await asyncio.sleep(_CUT_SECONDS)
    await asyncio.to_thread(line.connect, container, service)


async def stopped(line: ComposeLine, service: str) -> None:
    """Restart the service as an operator does: SIGTERM, and started again."""
    await asyncio.to_thread(line.stack.compose, "restart", service)


BREAKS: dict[str, Break] = {"killed": killed, "paused": paused, "cut off": cut_off, "stopped": stopped}


@pytest.fixture(scope="module")
def line(figures: list[str]) -> Iterator[ComposeLine]:
    line = ComposeLine()
    try:
        line.stack.compose("build", timeout=1500)
        line.stack.compose("up", "--wait", "--wait-timeout", "600", timeout=700)
        figures.append(HEADINGS)
        yield line
    finally:
        line.stack.down()
        line.stack.remove_images()


@pytest.fixture(scope="module")
def trials(line: ComposeLine) -> Trials:
    return Trials(line, Workload(SEED, longest=600))


@pytest.mark.parametrize("way", BREAKS)
@pytest.mark.parametrize("kind", ["executor", "scheduler", "tokenizer", "redis"])
async def test_fault(line: ComposeLine, trials: Trials, figures: list[str], kind: str, way: str) -> None:
    rng = random.Random(f"{kind} {way} {SEED}")
    service = rng.choice([service for service in SERVICES if service.removesuffix("-2") == kind])
    may_fail = kind == "tokenizer" and way != "paused"  # as in `fault_promises`

    async def inject(_: object) -> None:
        await BREAKS[way](line, service)

    tally = Tally(f"{kind} {way}")
    try:
        await line.wait_linked()
        await trials.prepare()
        await trials.run(Fault(inject, errors=may_fail, unsaved=kind == "redis"), SECONDS, rng, tally)
    finally:
        figures.append(str(tally))


@pytest.mark.parametrize("services", [EXECUTORS, SCHEDULERS, TOKENIZERS], ids=["executor", "scheduler", "tokenizer"])
async def test_upgrade(line: ComposeLine, trials: Trials, figures: list[str], services: tuple[str, str]) -> None:
    """Two services are upgraded, one after the other, while streams run: no stream ends with an error."""
    await line.wait_linked()
    await trials.prepare()
    line.stack.new_release()
    await asyncio.to_thread(line.stack.compose, "build", timeout=1500)
    tally = Tally(f"{services[0]} upgraded, one by one")
    started = time.monotonic()
    for service in services:

        async def inject(_: object, service: str = service) -> None:
            await asyncio.to_thread(line.stack.compose, "up", "-d", "--no-deps", "--wait", service)

        await trials.run(Fault(inject), SECONDS, random.Random(f"{service} {SEED}"), tally)
    figures.append(f"{tally} ({time.monotonic() - started:.0f} s)")
