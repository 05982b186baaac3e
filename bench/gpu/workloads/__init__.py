"""Calls of every op in the shapes of the presets, each with what it has to move and, where torch has one, its own."""

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
