"""Compiles what serving launches, in a pool of processes, before anything is measured."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures import TimeoutError as Late
from typing import Any

from bench.gpu.part import Bench, Findings
from bench.gpu.worker import die_with_parent
from scalellm.kernels import Capability, Launch, select_ops
from scalellm.kernels.launch import complete
from scalellm.kernels.spec import SERVED

_MOST_PROCESSES = 12
_OF_A_DRY_RUN = 8  # cases


class CompilingLaunch(Launch):
    """Compiles into Triton's cache instead of launching; tensors need no memory."""

    def __init__(self, capability: Capability) -> None:
        super().__init__(capability)
        self.compiled = 0

    def __call__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        *args: Any,
        num_warps: int = 4,
        num_stages: int = 2,
        **constexprs: Any,
    ) -> None:
        """Compile the variant that this launch would need."""
        tail, options = complete(kernel, self.capability, args, constexprs)
        kernel.warmup(*args, *tail, grid=grid, num_warps=num_warps, num_stages=num_stages, **options)
        self.compiled += 1


class Compile:
    """Goes through the calls that `make aot` compiles."""

    def run(self, bench: Bench, found: Findings) -> None:
        """Compile; a check for each case that does not, and a row when all is done or the time is spent.

        A dry run only goes through the calls: the interpreter compiles nothing.
        """
        capability, dry = bench.device.capability, bench.device.dry_run
        chosen = [i for i, case in enumerate(SERVED) if case.min_sm <= capability.sm]
        if dry:
            chosen = chosen[:_OF_A_DRY_RUN]
        processes = 1 if dry else max(1, min(_MOST_PROCESSES, (os.cpu_count() or 1) - 1))
        done = compiled = 0
        pool = ProcessPoolExecutor(
            processes, mp_context=multiprocessing.get_context("spawn"), initializer=die_with_parent
        )
        tasks = {pool.submit(compile_case, i, capability, dry): SERVED[i].name for i in chosen}
        try:
            for task in as_completed(tasks, timeout=None if dry else max(0.0, bench.seconds_left())):
                with found.attempt(f"compile {tasks[task]}", bench.device):
                    compiled += task.result()
                done += 1
        except Late:
            found.note(f"compile: {len(tasks) - done} of {len(tasks)} cases left out: the time is spent")
        pool.shutdown(wait=dry, cancel_futures=True)
        found.row(cases=done, variants=compiled, processes=processes)
        found.check("every op's variants were gone through", compiled > 0)


def compile_case(index: int, capability: Capability, dry_run: bool) -> int:
    """Compile what one case launches, and return the number of its launches."""
    case = SERVED[index]
    if dry_run:
        from scalellm.kernels.aot.recorder import recorded

        return len(recorded(case, capability).variants)
    launch = CompilingLaunch(capability)
    case.trace(select_ops(capability, dtype=case.dtype, launch=launch))
    return launch.compiled
