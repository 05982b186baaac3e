"""Tokens in columns: what goes in as runs comes out as the same runs, however frames are merged."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scalellm.services.common.link import add_tokens, token_runs
from scalellm.v1 import link_pb2

NUMBERS = st.integers(0, 2**32 - 1)
RUNS = st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS, st.lists(NUMBERS, max_size=4)), max_size=8)


def columns(runs) -> link_pb2.StepOutput:
    step = link_pb2.StepOutput()
    for run in runs:
        add_tokens(step, *run)
    return step


@given(RUNS, RUNS)
def test_runs_come_back(first, second):
    assert list(token_runs(columns(first))) == first
    merged = columns(first).SerializeToString() + columns(second).SerializeToString()
    assert list(token_runs(link_pb2.StepOutput.FromString(merged))) == first + second


def test_columns_that_disagree_are_not_taken_for_shorter_ones():
    step = columns([(1, 0, 0, [5]), (2, 0, 0, [6])])
    step.offsets.pop()
    with pytest.raises(ValueError, match="zip"):
        list(token_runs(step))
