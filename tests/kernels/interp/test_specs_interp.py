"""Each op's Triton form on the cases of its specification (`kernels/spec`)."""

import pytest
import torch

from scalellm.kernels import select_ops
from scalellm.kernels.dispatch import OP_NAMES
from scalellm.kernels.spec import BRIEF, SMALL, draws

CPU = torch.device("cpu")

# numpy's: the sigmoid of a gate far below 0, rows without a finite maximum, temperatures next to 0.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.parametrize("case", [*SMALL, *draws.SMALL], ids=lambda case: case.name)
def test_case(launch, case):
    ops = select_ops(launch.capability, dtype=torch.bfloat16, kv_cache_dtype=case.kv_cache_dtype, launch=launch)
    outcome = case.check(ops, CPU)
    assert outcome.passed, outcome


def test_a_dry_run_goes_through_every_op():
    assert {case.op for case in BRIEF} == set(OP_NAMES)
