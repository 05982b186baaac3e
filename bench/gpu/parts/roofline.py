"""Each op in the shapes of the presets: time, what that is of the ceiling measured in this run, and torch's own."""

from __future__ import annotations

import torch

from bench.gpu.part import Bench, Findings
from bench.gpu.roofline import Ceilings
from bench.gpu.timing import Timing, num_sets, time_op
from bench.gpu.workloads import all_workloads
from bench.gpu.workloads.workload import Workload
from scalellm.kernels import Launch, select_ops
from scalellm.kernels.spec.case import Maker


class Roofline:
    """Times every workload."""

    def run(self, bench: Bench, found: Findings) -> None:
        """Add a row for each workload as it is timed, and a check for each that has a target."""
        ceilings = Ceilings.of(bench.shared)
        workloads = _chosen(bench)
        launch = Launch(bench.device.capability)
        for i, workload in enumerate(workloads):
            if bench.seconds_left() < 0:
                found.note(f"roofline: {len(workloads) - i} rows left out: the time is spent")
                break
            if bench.device.capability.sm >= workload.min_sm:
                with found.attempt(f"roofline {workload.name}", bench.device):
                    self._measure(workload, bench, launch, ceilings, found)

    def _measure(self, workload: Workload, bench: Bench, launch: Launch, ceilings: Ceilings, found: Findings) -> None:
        device = bench.device
        ops = select_ops(device.capability, dtype=torch.bfloat16, kv_cache_dtype=workload.kv_cache_dtype, launch=launch)
        num_bytes = int(max(workload.cost.num_bytes, workload.resident_bytes, 1))
        sets = num_sets(device, num_bytes)
        make = Maker.on(device.target)
        timing = time_op(device, [workload.bind(ops, make) for _ in range(sets)], num_bytes)
        own = self._own(workload, bench, sets, num_bytes, found)
        floor = workload.cost.floor_us(ceilings)
        moves_bytes = workload.cost.is_bandwidth(ceilings)
        flops = workload.cost.bf16_flops + workload.cost.fp8_flops
        found.row(
            op=workload.op,
            shape=workload.shape,
            us=timing.us,
            rate=workload.cost.num_bytes / timing.us / 1e3 if moves_bytes else flops / timing.us / 1e6,
            unit="GB/s" if moves_bytes else "TFLOP/s",
            ceiling=floor / timing.us,
            alone_us=timing.replay_us,
            torch_us=own.us if own else None,
            torch=workload.own_name if own else None,
            cold=timing.cold,
            form=ops.backends[workload.op],
        )
        if workload.target is not None:
            share = floor / timing.us
            found.check(
                f"{workload.name}: at least {workload.target:.0%} of the ceiling",
                None if device.dry_run else share >= workload.target,
                "" if device.dry_run else f"{share:.1%}",
                target=True,
            )

    @staticmethod
    def _own(workload: Workload, bench: Bench, sets: int, num_bytes: int, found: Findings) -> Timing | None:
        if workload.own is None:
            return None
        make = Maker.on(bench.device.target)
        try:
            return time_op(bench.device, [workload.own(make) for _ in range(sets)], num_bytes)
        except Exception as error:  # its form may not be capturable, or want more memory: that is not ours to mend
            found.note(f"{workload.name}: torch's own ({workload.own_name}) cannot be timed: {error}"[:300])
            return None


def _chosen(bench: Bench) -> list[Workload]:
    """Return the workloads of the ops that the part's options name, in that order; without any, all."""
    workloads = all_workloads(tiny=bench.device.dry_run)
    ops = bench.options.get("ops")
    return workloads if ops is None else [workload for op in ops for workload in workloads if workload.op == op]
