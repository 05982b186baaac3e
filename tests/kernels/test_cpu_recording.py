"""Calls of C++ forms that are recorded and made again."""

import pytest
import torch

from scalellm.kernels import Capability, Ops, select_ops
from scalellm.kernels.cpu.recording import NotRecordableError, Recorder
from scalellm.kernels.spec.case import lay_keys


@pytest.fixture
def ops() -> Ops:
    chosen = select_ops(Capability.of(torch.device("cpu")), dtype=torch.float32)
    if chosen.library is None:
        pytest.skip("there is no compiler")
    return chosen


def test_a_replay_computes_what_the_calls_did_on_new_inputs(ops):
    x, weight = torch.randn(4, 64), torch.rand(64)

    def run():
        y = x
        for _ in range(6):
            y = ops.fused_add_rms_norm(y.view(4, 64), None, weight, 1e-5)
        return ops.silu_and_mul(y)

    expected = run()
    recorder = Recorder(ops.library)
    recording = recorder.record(run)
    assert torch.equal(recording.result, expected)
    others = recorder.record(run)  # on the same memory, except for the result
    assert others.result.data_ptr() != recording.result.data_ptr()
    for _ in range(2):
        x.copy_(torch.randn(4, 64))
        expected = run()
        others.result.fill_(torch.nan)
        assert torch.equal(recording.replay(), expected)
        assert torch.equal(others.replay(), expected)


def test_an_op_of_torch_is_refused(ops):
    x = torch.randn(4, 64)
    with pytest.raises(NotRecordableError, match="add"):
        Recorder(ops.library).record(lambda: ops.silu_and_mul(x) + 1)
    assert torch.equal(ops.silu_and_mul(x), Recorder(ops.library).record(lambda: ops.silu_and_mul(x)).result)


def test_a_call_that_finds_fault_is_named(ops):
    caches = lay_keys(ops, torch.zeros(2, 16, 1, 32)), torch.zeros(2, 16, 1, 32)
    positions, slots = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    qkv, angles = torch.randn(1, 96), torch.randn(8, 32)
    recording = Recorder(ops.library).record(lambda: ops.qk_norm_rope_and_cache(qkv, positions, angles, slots, *caches))
    slots.fill_(32)
    with pytest.raises(ValueError, match="qk_norm_rope_and_cache: a recorded call"):
        recording.replay()
