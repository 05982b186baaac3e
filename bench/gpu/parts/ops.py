"""One case of each op and dtype, eager and captured: whether anything runs at all, and is right, within seconds."""

from __future__ import annotations

from bench.gpu.part import Bench, Findings
from bench.gpu.parts.graphs import replay
from scalellm.kernels import Launch, select_ops
from scalellm.kernels.spec import BRIEF, ON_DEVICE, one_of_each


class OpsOnce:
    """Checks results against float64 and replays against eager."""

    def run(self, bench: Bench, found: Findings) -> None:
        """Run the cases; a row and the checks of each as it ends."""
        device = bench.device
        launch = Launch(device.capability)
        cases = BRIEF if device.dry_run else one_of_each(ON_DEVICE)
        for i, case in enumerate(cases):
            if bench.seconds_left() < 0:
                found.note(f"ops: {len(cases) - i} cases left out: the time is spent")
                break
            if bench.obstacle(case):
                continue
            with found.attempt(f"ops {case.name}", device):
                ops = select_ops(device.capability, dtype=case.dtype, kv_cache_dtype=case.kv_cache_dtype, launch=launch)
                outcome = case.check(ops, device.target)
                found.check(f"ops {case.name}", outcome.passed, outcome.detail)
                variants = replay(case, device, found)
                found.row(
                    op=case.op,
                    case=case.what,
                    of_limit=outcome.error / outcome.tolerance if outcome.tolerance else outcome.error,
                    form=ops.backends[case.op],
                    captured=variants is not None,
                )
