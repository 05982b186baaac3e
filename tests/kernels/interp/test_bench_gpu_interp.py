"""The calls of `make gpu` in tiny sizes, so that a change of an op that they do not follow is seen without a GPU."""

import pytest
import torch

from bench.gpu.cases import all_cases, all_checks
from bench.gpu.cases.case import Maker
from bench.gpu.workloads import all_workloads
from kernels import select_ops
from kernels.dispatch import OP_NAMES

CPU = torch.device("cpu")

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def ops_for(launch, case):
    return select_ops(launch.capability, dtype=torch.bfloat16, kv_cache_dtype=case.kv_cache_dtype, launch=launch)


@pytest.mark.parametrize("case", all_checks(tiny=True), ids=lambda case: case.name)
def test_case(launch, case):
    outcome = case.check(ops_for(launch, case), CPU)
    assert outcome.passed, outcome


@pytest.mark.parametrize("workload", all_workloads(tiny=True), ids=lambda workload: workload.name)
def test_workload(launch, workload):
    if workload.op != "sample":  # seconds on the interpreter, and a case above
        workload.bind(ops_for(launch, workload), Maker.on(CPU))()
    if workload.own is not None:
        workload.own(Maker.on(CPU))()


@pytest.mark.parametrize("tiny", [False, True])
def test_every_op_has_a_case_and_names_are_different(tiny):
    for listed in (all_checks(tiny=tiny), all_workloads(tiny=tiny)):
        names = [item.name for item in listed]
        assert len(set(names)) == len(names)
    assert {case.op for case in all_cases(tiny=tiny)} == set(OP_NAMES)
