"""Each op's torch and C++ forms on the cases of its specification (`kernels/spec`)."""

from dataclasses import replace

import pytest
import torch

from cpu_levels import library_rounds_inputs_to_bfloat16
from scalellm.kernels.dispatch import OP_NAMES
from scalellm.kernels.spec import DRAWS, ON_DEVICE, SERVED, SMALL

CPU = torch.device("cpu")


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_case(ops, case):
    attends_to_codes = "attention" in case.op and case.kv_cache_dtype == torch.float8_e4m3fn
    if attends_to_codes and ops.backends[case.op] == "cpp" and library_rounds_inputs_to_bfloat16(ops.library):
        case = replace(case, tolerance=1e-2)  # queries and weights are rounded, and multiplied as pairs
    outcome = case.check(ops, CPU)
    assert outcome.passed, outcome


def test_every_op_has_cases_and_their_names_are_different():
    for cases in (SMALL, ON_DEVICE):
        assert {case.op for case in cases} == set(OP_NAMES)
    assert set(SERVED) <= set(ON_DEVICE)
    names = [case.name for case in (*SMALL, *ON_DEVICE, *DRAWS)]
    assert sorted(names) == sorted(set(names))
