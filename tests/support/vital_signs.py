"""Vital signs that an attack must leave alone: processes, memory, files, tasks, books, a neighbour's answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import aiohttp
import grpc
import psutil

from line import Line, generate, scrape
from scalellm.v1 import common_pb2, generation_pb2
from service_processes import PATIENCE, ServiceProcess

MEMORY_MARGIN = 32 * 2**20
"""Bytes by which a service's processes may have grown after an attack that was run before, and so has already made
pools and arenas grow: allocators differ by so much from run to run. What is kept of each frame or request, of the
thousands that an attack sends, is more."""

REQUEST = generation_pb2.GenerateRequest(prompt="Hi", sampling=common_pb2.SamplingParams(max_tokens=3))


@dataclass(frozen=True)
class Vitals:
    """A line at rest."""

    processes: dict[str, frozenset[int]]
    rss: dict[str, int]
    files: dict[str, int]
    tasks: float


@dataclass
class Neighbour:
    """Somebody whose requests are answered, whatever others do."""

    num_answers: int = 0


def services(line: Line) -> dict[str, ServiceProcess]:
    return {"tokenizer": line.tokenizer, "scheduler": line.scheduler, "executor": line.executors[0]}


def family(service: ServiceProcess) -> list[psutil.Process]:
    return [psutil.Process(service.pid), *service.children()]


def vitals(line: Line) -> Vitals:
    families = {name: family(service) for name, service in services(line).items()}
    edge, core = scrape(line.tokenizer), scrape(line.scheduler)
    return Vitals(
        {name: frozenset(member.pid for member in members) for name, members in families.items()},
        {name: sum(member.memory_info().rss for member in members) for name, members in families.items()},
        {name: sum(member.num_fds() for member in members) for name, members in families.items()},
        edge["scalellm_tokenizer_asyncio_tasks"] + core["scalellm_scheduler_asyncio_tasks"],
    )


def faults(line: Line, before: Vitals) -> list[str]:
    """Differences that may take a moment to go; empty when the line is at rest again."""
    now, found = vitals(line), []
    for name in now.rss:
        if now.processes[name] != before.processes[name]:
            found.append(f"{name}: processes {set(before.processes[name])} became {set(now.processes[name])}")
        if now.rss[name] > before.rss[name] + MEMORY_MARGIN:
            found.append(f"{name}: {before.rss[name] >> 20} MiB became {now.rss[name] >> 20}")
        if now.files[name] > before.files[name] + 8:  # Redis is asked on as many connections as there are calls at once
            found.append(f"{name}: {before.files[name]} open files became {now.files[name]}")
    if now.tasks > before.tasks + 2:  # scrapes come and go
        found.append(f"{before.tasks} asyncio tasks became {now.tasks}")
    executor = scrape(line.executors[0])
    held = executor["scalellm_executor_num_requests_running"] + executor["scalellm_executor_num_requests_waiting"]
    ended = sum(value for name, value in executor.items() if name.startswith("scalellm_executor_requests_total{"))
    if held or executor["scalellm_executor_requests_accepted_total"] != ended:
        found.append(f"executor: {held} requests held, {ended} ended")
    return found


async def rest(line: Line, before: Vitals | None = None, patience: float = PATIENCE) -> Vitals:
    """Wait until nothing runs and everything is as it was. Raises AssertionError with what is not."""
    deadline = asyncio.get_running_loop().time() + patience
    while True:
        state = await line.scheduler_state()
        found = [] if before is None else await asyncio.to_thread(faults, line, before)
        if state.queued + state.running:
            found.append(f"scheduler: {state.queued} queued, {state.running} running")
        if state.accepted != state.finished + state.cancelled + state.rejected + state.queued + state.running:
            found.append(f"scheduler: the books do not add up: {state}")
        if not found:
            return await asyncio.to_thread(vitals, line)
        assert asyncio.get_running_loop().time() < deadline, "; ".join(found)
        await asyncio.sleep(0.3)


def assert_silent(line: Line) -> None:
    for name, service in services(line).items():
        text = service.log.read_text(errors="replace")
        assert "Traceback" not in text, f"{name}: {text[text.index('Traceback') - 500 :][:4000]}"
        assert len(text) < 2**20, f"{name} has written {len(text)} characters of log"


Ask = Callable[[], Awaitable[None]]
"""Asks once. Raises AssertionError unless it is answered."""


@asynccontextmanager
async def _asking_by_grpc(line: Line) -> AsyncIterator[Ask]:
    async with line.channel() as channel:

        async def ask() -> None:
            answer = await generate(channel, REQUEST, timeout=PATIENCE)
            assert answer.code is grpc.StatusCode.OK, f"the neighbour got {answer.code}: {answer.details}"

        yield ask


@asynccontextmanager
async def _asking_by_http(line: Line) -> AsyncIterator[Ask]:
    url = f"http://{line.tokenizer.http_address}/v1/completions"
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=PATIENCE)) as session:

        async def ask() -> None:
            async with session.post(url, json={"prompt": "Hi", "max_tokens": 3}) as response:
                body = await response.text()
            assert response.status == 200, f"the neighbour got {response.status}: {body}"

        yield ask


@asynccontextmanager
async def neighbour(line: Line, *, by_http: bool = False) -> AsyncIterator[Neighbour]:
    """Somebody who asks one thing after the other on a connection of their own, and is answered each time."""
    counts, is_over = Neighbour(), False

    async def ask() -> None:
        async with (_asking_by_http if by_http else _asking_by_grpc)(line) as ask_once:
            while not is_over or not counts.num_answers:
                await ask_once()
                counts.num_answers += 1
                await asyncio.sleep(0.05)

    asking = asyncio.create_task(ask())
    try:
        yield counts
    finally:
        is_over = True
        await asking
