"""A line at rest: its counters add up, and every resource is back at what it was before."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fault_member import Member, Named, info_of, state_of
from fault_redis import FaultRedis
from line import Scraped, scrape
from mixed_load import total
from service_processes import PATIENCE

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
        total(scrape(member.process), task_metric) if task_metric is not None else 0,
    )


async def rest(
    executors: Sequence[Member],
    schedulers: Sequence[Member],
    tokenizers: Sequence[Member],
    redis: FaultRedis,
    before: Mapping[str, Vitals],
    memory_margin: int,
) -> dict[str, Vitals]:
    """Wait until nothing runs and everything is as it was. Raises AssertionError that names the differences.

    Args:
        executors: All executors; likewise `schedulers` and `tokenizers`.
        before: Vitals at rest before the load, by process name.
        memory_margin: Bytes by which a service's processes may have grown since.
    """
    members = [*executors, *schedulers, *tokenizers]
    deadline = time.monotonic() + PATIENCE
    while True:
        found = [
            *[problem for member in executors for problem in await executor_problems(member)],
            *[problem for member in schedulers for problem in await scheduler_problems(member)],
            *[problem for member in tokenizers for problem in await tokenizer_problems(member.name, member.process)],
        ]
        if keys := await asyncio.to_thread(redis.keys_without_ttl):
            found.append(f"Redis keys without an end: {keys}")
        if not found:
            now = {member.name: await asyncio.to_thread(vitals, member) for member in members}
            found = [
                problem for name, then in before.items() for problem in _growth(name, then, now[name], memory_margin)
            ]
            if not found:
                # A process that is new grows until it has done as much as the others.
                return {name: _baseline(before.get(name), vital) for name, vital in now.items()}
        assert time.monotonic() < deadline, "; ".join(found)
        await asyncio.sleep(0.3)


async def executor_problems(member: Named) -> list[str]:
    """Describe what keeps an executor from being at rest."""
    info = await info_of(member)
    load, found = info.load, []
    if load.running or load.waiting or load.free_blocks != load.total_blocks:
        found.append(f"{member.name} holds requests or blocks: {load}")
    if info.accepted != info.finished + info.cancelled + info.rejected:
        found.append(f"{member.name}: the books do not add up: {info}")
    return found


async def scheduler_problems(member: Named) -> list[str]:
    """Describe what keeps a scheduler from being at rest."""
    state, found = await state_of(member), []
    if state.queued or state.running:
        found.append(f"{member.name}: {state.queued} queued, {state.running} running")
    if state.accepted != state.finished + state.cancelled + state.rejected + state.queued + state.running:
        found.append(f"{member.name}: the books do not add up: {state}")
    return found


async def tokenizer_problems(name: str, service: Scraped) -> list[str]:
    """Describe what keeps a tokenizer from being at rest."""
    edge = await asyncio.to_thread(scrape, service)
    running = total(edge, "scalellm_tokenizer_requests_running")
    ended = total(edge, "scalellm_tokenizer_requests_ended_total")
    accepted = total(edge, "scalellm_tokenizer_requests_accepted_total")
    if running or accepted != ended:
        return [f"{name}: {accepted} accepted, {ended} ended, {running} running"]
    return []


def _baseline(then: Vitals | None, now: Vitals) -> Vitals:
    return then if then is not None and then.processes == now.processes else now


def _growth(name: str, then: Vitals, now: Vitals, memory_margin: int) -> list[str]:
    if now.processes != then.processes:
        return []
    found = []
    if now.rss > then.rss + memory_margin:
        found.append(f"{name}: {then.rss >> 20} MiB became {now.rss >> 20}")
    if now.files > then.files + 16:  # Redis is asked on as many connections as there are calls at once
        found.append(f"{name}: {then.files} open files became {now.files}")
    if now.tasks > then.tasks + 4:  # scrapes come and go
        found.append(f"{name}: {then.tasks} asyncio tasks became {now.tasks}")
    return found
