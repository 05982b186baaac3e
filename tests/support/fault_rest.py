"""What a line must look like once nothing runs: books that add up, and as much of everything as before."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

import psutil

from fault_line import FaultLine, Member, info_of, state_of
from line import scrape
from mixed_load import total
from service_processes import PATIENCE

MEMORY_MARGIN = 48 * 2**20
"""Bytes by which a service's processes may have grown under a load that was run before: pools and arenas differ."""

_TASKS = {"tokenizer": "scalellm_tokenizer_asyncio_tasks", "scheduler": "scalellm_scheduler_asyncio_tasks"}


@dataclass(frozen=True)
class Vitals:
    """One service at rest. Those of another incarnation of its processes cannot be compared."""

    processes: frozenset[tuple[int, float]]
    rss: int
    files: int
    tasks: float


def vitals(member: Member) -> Vitals:
    family = member.family()
    task_metric = _TASKS.get(member.kind)
    return Vitals(
        frozenset((process.pid, process.create_time()) for process in family),
        sum(process.memory_info().rss for process in family),
        sum(process.num_fds() for process in family),
        scrape(member.process)[task_metric] if task_metric is not None else 0,
    )


async def rest(line: FaultLine, before: dict[str, Vitals] | None = None) -> dict[str, Vitals]:
    """Wait until nothing runs and everything is as it was. Raises AssertionError with what is not."""
    deadline = time.monotonic() + PATIENCE
    while True:
        found = await _faults(line, before or {})
        if not found:
            return {member.name: await asyncio.to_thread(vitals, member) for member in line.members}
        assert time.monotonic() < deadline, "; ".join(found)
        await asyncio.sleep(0.3)


async def _faults(line: FaultLine, before: dict[str, Vitals]) -> list[str]:
    found = []
    for member in line.executors:
        info = await info_of(member)
        load = info.load
        if load.running or load.waiting or load.free_blocks != load.total_blocks:
            found.append(f"{member.name} holds requests or blocks: {load}")
        if info.accepted != info.finished + info.cancelled + info.rejected:
            found.append(f"{member.name}: the books do not add up: {info}")
    for member in line.schedulers:
        state = await state_of(member)
        if state.queued or state.running:
            found.append(f"{member.name}: {state.queued} queued, {state.running} running")
        if state.accepted != state.finished + state.cancelled + state.rejected + state.queued + state.running:
            found.append(f"{member.name}: the books do not add up: {state}")
    for member in line.tokenizers:
        edge = await asyncio.to_thread(scrape, member.process)
        running = edge["scalellm_tokenizer_requests_running"]
        ended = total(edge, "scalellm_tokenizer_requests_ended_total")
        accepted = total(edge, "scalellm_tokenizer_requests_accepted_total")
        if running or accepted != ended:
            found.append(f"{member.name}: {accepted} accepted, {ended} ended, {running} running")
    if keys := await asyncio.to_thread(line.redis.keys_without_ttl):
        found.append(f"Redis keys without an end: {keys}")
    for member in line.members:
        if (then := before.get(member.name)) is not None:
            try:
                found += _growth(member.name, then, await asyncio.to_thread(vitals, member))
            except (psutil.NoSuchProcess, OSError) as error:
                found.append(f"{member.name}: {error!r}")
    return found


def _growth(name: str, then: Vitals, now: Vitals) -> list[str]:
    if now.processes != then.processes:
        return []
    found = []
    if now.rss > then.rss + MEMORY_MARGIN:
        found.append(f"{name}: {then.rss >> 20} MiB became {now.rss >> 20}")
    if now.files > then.files + 16:  # Redis is asked on as many connections as there are calls at once
        found.append(f"{name}: {then.files} open files became {now.files}")
    if now.tasks > then.tasks + 4:  # scrapes come and go
        found.append(f"{name}: {then.tasks} asyncio tasks became {now.tasks}")
    return found
