"""Every op against float64, in several processes at once: what takes time is compiling, and that is one core's work."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

from bench.gpu.part import Bench, Findings, Kind, PartSpec
from bench.gpu.supervisor import Listener, Supervisor
from scalellm.kernels import Launch, select_ops
from scalellm.kernels.dispatch import OP_NAMES
from scalellm.kernels.spec import BRIEF, DRAWS, ON_DEVICE
from scalellm.kernels.spec.case import Case
from scalellm.kernels.spec.draws import DrawCase

_MOST_PROCESSES = 8
_GIB = 2**30
_ROOM = 4 * _GIB  # of each process, for CUDA itself and the larger cases
_SECONDS = 200.0  # of a share, less than this part's own: what is started here ends before it is stopped


class Parity:
    """Deals the cases out to processes and puts together what they found."""

    def run(self, bench: Bench, found: Findings) -> None:
        """Run every case; a check for each as it ends, and a row for each op at the end."""
        shares = self._processes(bench)
        rows: list[dict[str, Any]] = []

        def listen(part: str, kind: Kind, value: dict[str, Any]) -> None:
            if kind == "row":
                rows.append(value)
            elif kind == "check":
                found.check(**value)
            elif kind == "note":
                found.note(value["text"])
            elif kind == "end" and value["error"] is not None:
                found.check("parity: a process of it", False, value["error"])

        threads = [threading.Thread(target=self._share, args=(bench, i, shares, listen)) for i in range(shares)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self._sum_up(rows, found)

    @staticmethod
    def _processes(bench: Bench) -> int:
        if bench.device.dry_run:
            return 1
        return max(1, min(_MOST_PROCESSES, os.cpu_count() or 1, bench.device.free_bytes() // _ROOM))

    @staticmethod
    def _share(bench: Bench, share: int, of: int, listen: Listener) -> None:
        """Run a share, going on in a new process after a case that lost the device."""
        first = 0
        while True:
            seconds = min(_SECONDS, bench.seconds_left())
            spec = PartSpec("parity share", __name__, "ParityShare", 0, seconds, "")
            supervisor = Supervisor(dry_run=bench.device.dry_run, budget_s=seconds, listen=listen)
            (result,) = supervisor.run([spec], options={**bench.options, "share": share, "of": of, "first": first})
            first = result.shared.get("first", 0)
            if not first:
                return

    @staticmethod
    def _sum_up(rows: list[dict[str, Any]], found: Findings) -> None:
        """Make the rows of cases rows of ops. An op without a case is a mistake."""
        for op in OP_NAMES:
            of_op = [row for row in rows if row["op"] == op]
            if not of_op:
                found.check(f"parity {op}", False, "no case of it was run")
                continue
            found.row(
                op=op,
                form=of_op[0]["form"],
                cases=len(of_op),
                passed=sum(row["passed"] for row in of_op),
                of_limit=max(row["of_limit"] for row in of_op),
                seconds=round(sum(row["seconds"] for row in of_op), 1),
            )


class ParityShare:
    """Runs every n-th case, beginning with the i-th."""

    def run(self, bench: Bench, found: Findings) -> None:
        """Run the cases of this share."""
        device = bench.device
        launch = Launch(device.capability)
        checks: tuple[Case | DrawCase, ...] = BRIEF if device.dry_run else (*ON_DEVICE, *DRAWS)
        cases = checks[bench.options["share"] :: bench.options["of"]]
        for i, case in enumerate(cases):
            if i < bench.options["first"]:
                continue
            if bench.seconds_left() < 0:
                found.note(f"parity: {len(cases) - i} cases left out: the budget is spent")
                break
            obstacle = bench.obstacle(case)
            if obstacle:
                found.note(f"parity {case.name}: left out, {obstacle}")
                continue
            if not self._run_case(case, bench, launch, found):
                found.share(first=i + 1)  # where a new process goes on
                return

    @staticmethod
    def _run_case(case: Case | DrawCase, bench: Bench, launch: Launch, found: Findings) -> bool:
        """Run a case; False when the device is lost."""
        device = bench.device
        start = time.perf_counter()
        form = ""
        try:
            ops = select_ops(device.capability, dtype=case.dtype, kv_cache_dtype=case.kv_cache_dtype, launch=launch)
            form = ops.backends[case.op]
            outcome = case.check(ops, device.target)
            passed, detail = outcome.passed, outcome.detail
            of_limit = outcome.error / outcome.tolerance if outcome.tolerance else outcome.error
        except Exception as error:
            passed, detail, of_limit = False, f"{type(error).__name__}: {error}"[:500], float("inf")
        found.check(f"parity {case.name}", passed, detail)
        seconds = time.perf_counter() - start
        found.row(op=case.op, form=form, passed=passed, of_limit=of_limit, seconds=seconds)
        try:
            device.synchronize()
            device.release()
        except RuntimeError:
            return False
        return True
