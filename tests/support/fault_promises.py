"""The promises under each fault: the table of docs/design.md in a form that tests can check."""

from __future__ import annotations

import signal
from dataclasses import dataclass

import fault_injectors as faults
from fault_injectors import Injector


@dataclass(frozen=True)
class Fault:
    """One fault and what clients may notice of it, beside a pause.

    Attributes:
        inject: Does it, and mends it.
        errors: Streams that run through the process that ends may end UNAVAILABLE.
        unsaved: A session's turn may be told of as not saved.
        needs_disk: Redis must have a file system of its own.
        on_cable: Kind of service that must have a network namespace of its own; empty: none.
    """

    inject: Injector
    errors: bool = False
    unsaved: bool = False
    needs_disk: bool = False
    on_cable: str = ""


KILL, TERM = signal.SIGKILL, signal.SIGTERM

FAULTS = {
    "client: slow reader": Fault(faults.clients_do_not_read),
    "engine: kill -9": Fault(faults.end_process("engine", KILL)),
    "engine: SIGSTOP": Fault(faults.stop_process("engine")),
    "executor: kill -9": Fault(faults.end_process("executor", KILL)),
    "executor: SIGTERM": Fault(faults.end_process("executor", TERM)),
    "executor: SIGSTOP": Fault(faults.stop_process("executor")),
    "executor: half-open link": Fault(faults.cut_off("executor")),
    "scheduler: kill -9": Fault(faults.end_process("scheduler", KILL)),
    "scheduler: SIGTERM": Fault(faults.end_process("scheduler", TERM)),
    "scheduler: SIGSTOP": Fault(faults.stop_process("scheduler")),
    "scheduler: half-open link": Fault(faults.cut_off("scheduler")),
    "worker: kill -9": Fault(faults.end_process("worker", KILL), errors=True),
    "worker: SIGTERM": Fault(faults.end_process("worker", TERM), errors=True),
    "worker: SIGSTOP": Fault(faults.stop_process("worker")),
    "tokenizer: kill -9": Fault(faults.end_process("tokenizer", KILL), errors=True),
    "tokenizer: SIGTERM": Fault(faults.end_process("tokenizer", TERM), errors=True),
    "tokenizer: SIGSTOP": Fault(faults.stop_process("tokenizer")),
    "template renderer: kill -9": Fault(faults.end_process("template renderer", KILL)),
    "template renderer: SIGSTOP": Fault(faults.stop_process("template renderer")),
    "redis: kill -9": Fault(faults.end_process("redis", KILL), unsaved=True),
    "redis: SIGTERM": Fault(faults.end_process("redis", TERM), unsaved=True),
    "redis: SIGSTOP": Fault(faults.stop_process("redis"), unsaved=True),
    "redis: half-open link": Fault(faults.cut_off("redis"), unsaved=True),
    "redis: out of memory": Fault(faults.redis_out_of_memory, unsaved=True),
    "redis: paused": Fault(faults.redis_paused, unsaved=True),
    "redis: disk full": Fault(faults.redis_disk_full, unsaved=True, needs_disk=True),
    "executor: cable pulled": Fault(faults.cable_pulled, on_cable="executor"),
    "scheduler: cable pulled": Fault(faults.cable_pulled, on_cable="scheduler"),
}

RANK_FAULTS = {
    "rank: kill -9": Fault(faults.end_process("rank", KILL)),
    "rank: SIGSTOP": Fault(faults.stop_process("rank")),
}
"""Faults of an executor whose model is held by several processes."""
