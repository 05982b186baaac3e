"""What is promised under which fault: the table of docs/design.md, as the tests know it."""

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
        errors: Which streams may end UNAVAILABLE: "" none; "sessions": those of sessions; "own": those that run
            through the process that ends.
        needs_disk: Redis must have a file system of its own.
        ends: Kind of the service whose process is another one afterwards.
    """

    inject: Injector
    errors: str = ""
    needs_disk: bool = False


KILL, TERM = signal.SIGKILL, signal.SIGTERM

FAULTS = {
    "engine: kill -9": Fault(faults.end_process("engine", KILL)),
    "engine: SIGSTOP": Fault(faults.stop_process("engine")),
    "executor: kill -9": Fault(faults.end_process("executor", KILL)),
    "executor: SIGTERM": Fault(faults.end_process("executor", TERM)),
    "executor: SIGSTOP": Fault(faults.stop_process("executor")),
    "executor: half-open link": Fault(faults.cut_off("executor")),
    "scheduler: kill -9": Fault(faults.end_process("scheduler", KILL), errors="own"),
    "scheduler: SIGTERM": Fault(faults.end_process("scheduler", TERM), errors="own"),
    "scheduler: SIGSTOP": Fault(faults.stop_process("scheduler")),
    "scheduler: half-open link": Fault(faults.cut_off("scheduler"), errors="own"),
    "worker: kill -9": Fault(faults.end_process("worker", KILL), errors="own"),
    "worker: SIGTERM": Fault(faults.end_process("worker", TERM), errors="own"),
    "worker: SIGSTOP": Fault(faults.stop_process("worker")),
    "tokenizer: kill -9": Fault(faults.end_process("tokenizer", KILL), errors="own"),
    "tokenizer: SIGTERM": Fault(faults.end_process("tokenizer", TERM), errors="own"),
    "tokenizer: SIGSTOP": Fault(faults.stop_process("tokenizer")),
    "template renderer: kill -9": Fault(faults.end_process("template renderer", KILL)),
    "template renderer: SIGSTOP": Fault(faults.stop_process("template renderer")),
    "redis: kill -9": Fault(faults.end_process("redis", KILL), errors="sessions"),
    "redis: SIGTERM": Fault(faults.end_process("redis", TERM), errors="sessions"),
    "redis: SIGSTOP": Fault(faults.stop_process("redis"), errors="sessions"),
    "redis: half-open link": Fault(faults.cut_off("redis"), errors="sessions"),
    "redis: out of memory": Fault(faults.redis_out_of_memory, errors="sessions"),
    "redis: paused": Fault(faults.redis_paused, errors="sessions"),
    "redis: disk full": Fault(faults.redis_disk_full, errors="sessions", needs_disk=True),
}
