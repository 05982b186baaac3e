"""Each op replayed from a graph against the op run eagerly, bit by bit, and compiles after warm-up."""

from __future__ import annotations

from bench.gpu.device import Device
from bench.gpu.part import Bench, Findings
from scalellm.kernels import Launch, select_ops
from scalellm.kernels.dispatch import OP_NAMES
from scalellm.kernels.spec import BRIEF, ON_DEVICE
from scalellm.kernels.spec.case import Case, Maker, bit_equal


class Graphs:
    """The ops as serving captures them: the Triton forms, with all room given to them."""

    def run(self, bench: Bench, found: Findings) -> None:
        """Run every case of a Triton form that parity has compiled already; a row for each op."""
        counts: dict[str, list[int]] = {name: [] for name in OP_NAMES}
        for case in BRIEF if bench.device.dry_run else ON_DEVICE:
            if bench.seconds_left() < 0:
                found.note("graphs: the rest is left out: the budget is spent")
                break
            if bench.obstacle(case):
                continue
            with found.attempt(f"graph {case.name}", bench.device):
                variants = replay(case, bench.device, found)
                if variants is not None:
                    counts[case.op].append(variants)
        for op, of_cases in counts.items():
            if of_cases:
                found.row(op=op, cases=len(of_cases), variants=sum(of_cases))


def replay(case: Case, device: Device, found: Findings) -> int | None:
    """Check replays of a case against the call; returns how many variants it compiled, None if it is in plain torch."""
    launch = Launch(device.capability)
    ops = select_ops(device.capability, dtype=case.dtype, kv_cache_dtype=case.kv_cache_dtype, launch=launch)
    if ops.backends[case.op] == "torch":
        return None
    bound = case.bind(ops, Maker.on(device.target))
    launch.warm_up([bound.run])
    eager = bound.snapshot()
    captured = device.capture(bound.run)
    different = []
    for _ in range(2):  # what the first replay left in scratch must not show in the second
        bound.reset()
        captured()
        device.synchronize()
        different += [name for name, value in bound.results.items() if not bit_equal(value, eager[name])]
    found.check(f"graph {case.name}", not different, f"different: {', '.join(different)}" if different else "")
    late = launch.late_variants
    found.check(f"no late compile {case.name}", not late, f"compiled late: {', '.join(late)}" if late else "")
    return launch.num_variants
