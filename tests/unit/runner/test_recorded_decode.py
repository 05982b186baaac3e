"""Recorded decode steps, against the same steps op by op."""

from dataclasses import replace

import pytest
import torch

from kernels import Capability, select_ops
from runner_kit import CPU, MODEL
from services.executor.models import (
    CausalLM,
    DecodeRows,
    ForwardContext,
    ModelRuntime,
    Quantization,
    allocate_kv_caches,
    dummy_model,
)
from services.executor.runner.recorded_decode import RecordedDecode

WIDE = replace(MODEL, hidden_size=64, intermediate_size=96, num_heads=2, num_kv_heads=1, head_dim=32)


def model_of(quantization: str) -> CausalLM:
    ops = select_ops(Capability.of(CPU), dtype=torch.float32)
    if ops.library is None:
        pytest.skip("there is no compiler")
    return dummy_model(WIDE, ModelRuntime(ops, quantization=Quantization(quantization)))  # type: ignore[arg-type]


@torch.inference_mode()
@pytest.mark.parametrize(("quantization", "records"), [("int8", True), ("none", False)])
def test_steps_are_the_same_bit_by_bit(quantization: str, records: bool) -> None:
    model = model_of(quantization)
    caches, expected_caches = (allocate_kv_caches(WIDE, 8, 16, dtype=torch.float32, device=CPU) for _ in range(2))
    recorded = RecordedDecode(model, caches, model.runtime.ops.library)
    ids, positions, slots = (torch.zeros(4, dtype=torch.int64) for _ in range(3))
    lens, tables = torch.zeros(4, dtype=torch.int32), torch.arange(8, dtype=torch.int32).view(4, 2)
    for step in range(20):
        rows = (4, 4, 2, 4, 2)[step % 5]
        for row in range(rows):
            ids[row] = (step * 7 + row) % WIDE.vocab_size
            positions[row] = step
            slots[row] = (row * 2 + step // 16) * 16 + step % 16
        lens.fill_(step + 1)
        context = ForwardContext(positions[:rows], slots[:rows], DecodeRows(lens[:rows], tables[:rows]), prefill=None)
        got = recorded.forward(ids[:rows], context).clone()
        assert torch.equal(got, model.forward(ids[:rows], context, expected_caches)), step
    for ours, others in zip(caches, expected_caches, strict=True):
        assert torch.equal(ours.k, others.k)
        assert torch.equal(ours.v, others.v)
    assert sorted(recorded._recordings) == ([2, 4] if records else [])
