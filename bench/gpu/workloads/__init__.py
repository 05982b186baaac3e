"""Calls of the ops that models make, in the shapes of the presets, each with what it moves and torch's own form."""

from bench.gpu.workloads import attention, gemm, layer, sampling
from bench.gpu.workloads.workload import Workload


def all_workloads(*, tiny: bool) -> list[Workload]:
    """Return every workload, the ones with targets and of the largest share of a step first."""
    return [
        *attention.workloads(tiny=tiny),
        *layer.workloads(tiny=tiny),
        *gemm.workloads(tiny=tiny),
        *sampling.workloads(tiny=tiny),
    ]
