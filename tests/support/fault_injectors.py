"""The faults: each breaks one thing of a line at once, and mends it as an operator's supervisor would."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import psutil

from fault_line import STALL_LIMIT, FaultLine
from fault_member import Member
from fault_streams import Stream
from service_processes import PATIENCE

Injector = Callable[["Scene"], Awaitable[None]]


@dataclass
class Scene:
    """The line and the streams on which a fault happens.

    Attributes:
        seconds: Seconds for which a process stays stopped or paused.
        rng: Source of all random choices.
        streams: Streams that run.
    """

    line: FaultLine
    seconds: float
    rng: random.Random
    streams: Sequence[Stream] = ()

    def one_of(self, kind: str) -> Member:
        members = {
            "executor": self.line.executors, "scheduler": self.line.schedulers, "tokenizer": self.line.tokenizers
        }  # fmt: skip
        return self.rng.choice(members[kind])


CHILDREN = {
    "engine": ("executor", "scalellm.services.executor.engine_process"),
    "rank": ("executor", "scalellm.services.executor.ranks.rank_process"),
    "worker": ("tokenizer", "scalellm.services.tokenizer.worker"),
    "template renderer": ("tokenizer", "scalellm.services.tokenizer.text.chat_render_process"),
}
"""Processes that a service starts, and starts again."""


def end_process(target: str, number: signal.Signals) -> Injector:
    """A process gets a signal that ends it. What no service would start again is started after a moment."""

    async def inject(scene: Scene) -> None:
        if target == "redis":
            redis = scene.line.redis
            os.kill(redis.pid, number)
            await asyncio.sleep(scene.rng.uniform(0, 2))
            await asyncio.to_thread(redis.restart)
        elif target in CHILDREN:
            kind, module = CHILDREN[target]
            child = scene.one_of(kind).child(module)
            child.send_signal(number)
            await asyncio.to_thread(child.wait, PATIENCE)
        else:
            member = scene.one_of(target)
            member.process.process.send_signal(number)
            await asyncio.to_thread(member.process.process.wait, PATIENCE)
            await asyncio.sleep(scene.rng.uniform(0, 2))
            await asyncio.to_thread(member.restart)

    return inject


def stop_process(target: str) -> Injector:
    """A process stands still for some seconds, as while a machine swaps or a virtual machine is moved."""

    async def inject(scene: Scene) -> None:
        if target == "redis":
            pid = scene.line.redis.pid
        elif target in CHILDREN:
            kind, module = CHILDREN[target]
            pid = scene.one_of(kind).child(module).pid
        else:
            pid = scene.one_of(target).process.pid
        process = psutil.Process(pid)
        process.suspend()
        try:
            await asyncio.sleep(scene.seconds)
        finally:
            with suppress(psutil.NoSuchProcess):  # it was ended because it stood still
                process.resume()

    return inject


def cut_off(target: str) -> Injector:
    """Cut a service off for longer than the limit on silence: nothing reaches or leaves it, no connection closes."""

    async def inject(scene: Scene) -> None:
        wire = scene.line.redis_wire if target == "redis" else scene.one_of(target).wire
        assert wire is not None
        wire.cut()
        try:
            await asyncio.sleep(scene.seconds if target == "redis" else STALL_LIMIT + scene.seconds)
        finally:
            wire.mend()

    return inject


async def cable_pulled(scene: Scene) -> None:
    """The network of a service in a namespace of its own is gone for longer than the limit on silence."""
    cable = scene.line.cable
    assert cable is not None
    cable.pull()
    try:
        await asyncio.sleep(STALL_LIMIT + scene.seconds)
    finally:
        cable.mend()


async def redis_out_of_memory(scene: Scene) -> None:
    """Redis refuses every write for some seconds."""
    redis = scene.line.redis
    limit = redis.command("CONFIG", "GET", "maxmemory").splitlines()[1]
    redis.command("CONFIG", "SET", "maxmemory", "1")
    await asyncio.sleep(scene.seconds)
    redis.command("CONFIG", "SET", "maxmemory", limit)


async def redis_paused(scene: Scene) -> None:
    """Redis takes commands and answers none of them for some seconds."""
    scene.line.redis.command("CLIENT", "PAUSE", str(int(1000 * scene.seconds)), "ALL")
    await asyncio.sleep(scene.seconds)


async def redis_disk_full(scene: Scene) -> None:
    """Redis cannot write its file for some seconds, and therefore takes no writes."""
    undo = await asyncio.to_thread(scene.line.redis.fill_disk)
    try:
        await asyncio.sleep(scene.seconds)
    finally:
        undo()


async def clients_do_not_read(scene: Scene) -> None:
    """A quarter of the clients take nothing for some seconds."""
    slow = scene.rng.sample(list(scene.streams), len(scene.streams) // 4)
    for stream in slow:
        stream.reading.clear()
    await asyncio.sleep(scene.seconds)
    for stream in slow:
        stream.reading.set()
