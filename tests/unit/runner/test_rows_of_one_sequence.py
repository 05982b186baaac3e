"""Rows that are consecutive tokens of one sequence, against a step for each of them or for all: bit by bit."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from runner_kit import CPU, MODEL
from scalellm.kernels import Capability, select_ops
from scalellm.services.executor.models import (
    CausalLM,
    DecodeRows,
    ForwardContext,
    KVCache,
    ModelRuntime,
    PrefillRows,
    Quantization,
    allocate_kv_caches,
    dummy_model,
)

WIDE = replace(
    MODEL,
    hidden_size=64,
    intermediate_size=96,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    max_position_embeddings=512,
)
PAGE, NUM_BLOCKS = 16, 24
FIRST = (1, 60, 250)
"""Positions at which rows begin: alone in a page, across tiles of 64 keys, across shares of 256."""
NUM_ROWS = 13


def model_of(quantization: str) -> CausalLM:
    ops = select_ops(Capability.of(CPU), dtype=torch.float32)
    if ops.library is None:
        pytest.skip("there is no compiler")
    return dummy_model(WIDE, ModelRuntime(ops, quantization=Quantization(quantization)))  # type: ignore[arg-type]


def rows(model: CausalLM, caches: list[KVCache], token_ids: Tensor, start: int, table: Tensor) -> Tensor:
    """Logits of consecutive tokens of one sequence, from one decode step."""
    count = len(token_ids)
    positions = torch.arange(start, start + count)
    slots = table[positions // PAGE].to(torch.int64) * PAGE + positions % PAGE
    lens = (positions + 1).to(torch.int32)
    context = ForwardContext(positions, slots, DecodeRows(lens, table.expand(count, -1).contiguous()), prefill=None)
    return model.compute_logits(model.forward(token_ids, context, caches)).clone()


@pytest.mark.parametrize("quantization", ["int8", "int4", "none"])
@torch.inference_mode()
def test_hidden_states_of_some_rows_are_those_of_all_rows(quantization: str) -> None:
    model = model_of(quantization)
    count = 150
    generator = torch.Generator().manual_seed(1)
    token_ids = torch.randint(0, WIDE.vocab_size, (count,), generator=generator)
    table = torch.randperm(NUM_BLOCKS, generator=generator).to(torch.int32)
    positions = torch.arange(count)
    slots = table[positions // PAGE].to(torch.int64) * PAGE + positions % PAGE
    chunk = PrefillRows(torch.tensor([0, count]).int(), torch.tensor([count]).int(), table.unsqueeze(0), count)
    context = ForwardContext(positions, slots, None, chunk)
    caches = [
        allocate_kv_caches(WIDE, NUM_BLOCKS, PAGE, dtype=torch.int8, device=CPU, ops=model.runtime.ops)
        for _ in range(3)
    ]
    hidden = model.forward(token_ids, context, caches[0])
    for some, cache in ((torch.tensor([3, 64, count - 1]), caches[1]), (positions[:0], caches[2])):
        got, attended, residual = model.forward_rows(token_ids, context, cache, some)
        assert torch.equal(got, hidden[some])
        assert residual.shape == hidden.shape
        assert attended.shape == (count, WIDE.num_heads * WIDE.head_dim)
        for ours, others in zip(cache, caches[0], strict=True):
            assert torch.equal(ours.k, others.k)
            assert torch.equal(ours.v, others.v)


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("quantization", ["int8", "int4", "none"])
@torch.inference_mode()
def test_rows_of_one_sequence_are_those_of_steps_on_their_own(quantization: str, cache_dtype: torch.dtype) -> None:
    model = model_of(quantization)
    generator = torch.Generator().manual_seed(1)
    token_ids = torch.randint(0, WIDE.vocab_size, (FIRST[-1] + NUM_ROWS,), generator=generator)
    table = torch.randperm(NUM_BLOCKS, generator=generator).to(torch.int32)
    alone, together = (
        allocate_kv_caches(WIDE, NUM_BLOCKS, PAGE, dtype=cache_dtype, device=CPU, ops=model.runtime.ops)
        for _ in range(2)
    )
    expected = torch.cat([rows(model, alone, token_ids[at : at + 1], at, table) for at in range(len(token_ids))])
    at = 0
    while at < len(token_ids):
        count = NUM_ROWS if at in FIRST else 1
        if count > 1:  # drafts that were wrong leave something in their slots
            rows(model, together, token_ids[at : at + count].flip(0), at, table)
        got = rows(model, together, token_ids[at : at + count], at, table)
        assert torch.equal(got, expected[at : at + count]), at
        at += count
    for ours, others in zip(together, alone, strict=True):
        assert torch.equal(ours.k, others.k)
        assert torch.equal(ours.v, others.v)
