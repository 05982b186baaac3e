"""Recorded decode steps, against the same steps op by op."""

import itertools
from dataclasses import replace

import pytest
import torch

import engine_kit
from grammar_kit import VOCABULARY
from runner_kit import CPU, MODEL, with_experts
from scalellm.kernels import Capability, select_ops
from scalellm.kernels.dispatch import Backend
from scalellm.services.executor.engine.engine import Engine
from scalellm.services.executor.grammar import LlGrammarCompiler
from scalellm.services.executor.models import (
    CausalLM,
    DecodeRows,
    ForwardContext,
    ModelConfig,
    ModelRuntime,
    Quantization,
    allocate_kv_caches,
    dummy_model,
)
from scalellm.services.executor.runner.device import CpuDevice
from scalellm.services.executor.runner.model_runner import ModelRunner
from scalellm.services.executor.runner.recorded_decode import RecordedDecode
from service_processes import PATIENCE

WIDE = replace(MODEL, hidden_size=64, intermediate_size=96, num_heads=2, num_kv_heads=1, head_dim=32)
MIXTURE = with_experts(WIDE)


def model_of(quantization: str, config: ModelConfig = WIDE, **overrides: Backend) -> CausalLM:
    ops = select_ops(Capability.of(CPU), dtype=torch.float32, overrides=overrides)
    if ops.library is None:
        pytest.skip("there is no compiler")
    # Biases can be recorded beside dense weights only: torch adds them to the products of integers.
    shape = replace(config, qkv_bias=quantization == "none")
    return dummy_model(shape, ModelRuntime(ops, quantization=Quantization(quantization)))  # type: ignore[arg-type]


@pytest.mark.parametrize("config", [WIDE, MIXTURE], ids=["dense", "experts"])
@pytest.mark.parametrize("quantization", ["int8", "int4", "none"])
@torch.inference_mode()
def test_steps_are_the_same_bit_by_bit(quantization: str, config: ModelConfig) -> None:
    model = model_of(quantization, config)
    caches, expected_caches = (
        allocate_kv_caches(WIDE, 8, 16, dtype=torch.float32, device=CPU, ops=model.runtime.ops) for _ in range(2)
    )
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
        got = recorded.run(rows, lambda n, context=context: (ids[:n], context))  # type: ignore[misc]
        assert got is not None
        hidden = model.forward(ids[:rows], context, expected_caches)
        assert torch.equal(got.hidden, hidden), step
        assert got.logits is not None
        assert torch.equal(got.logits, model.compute_logits(hidden))
        assert got.finite.all()
    assert recorded.has_equal_rows
    for ours, others in zip(caches, expected_caches, strict=True):
        assert torch.equal(ours.k, others.k)
        assert torch.equal(ours.v, others.v)
    caches[0].v[0, 0, 0, 0] = torch.nan  # of the first row
    assert sorted(recorded._recordings) == [(2, None), (4, None)]
    got = recorded.run(4, pytest.fail)
    assert got is not None
    assert got.finite.tolist() == [False, True, True, True]


@pytest.mark.parametrize("config", [WIDE, MIXTURE], ids=["dense", "experts"])
@torch.inference_mode()
def test_steps_that_were_recorded_before_they_occur_are_the_same_bit_by_bit(config: ModelConfig) -> None:
    model = model_of("int8", config)
    caches, expected_caches = (
        allocate_kv_caches(WIDE, 8, 16, dtype=torch.float32, device=CPU, ops=model.runtime.ops) for _ in range(2)
    )
    for cache in (*caches, *expected_caches):
        cache.k.fill_(0.5)
        cache.v.fill_(0.5)
    recorded = RecordedDecode(model, caches, model.runtime.ops.library)
    ids, positions, slots = (torch.full((4,), 2**40) for _ in range(3))  # nothing that could be computed with
    lens, tables = torch.full((4,), 2**30, dtype=torch.int32), torch.full((4, 2), 2**30, dtype=torch.int32)

    def inputs(rows: int) -> tuple[torch.Tensor, ForwardContext]:
        context = ForwardContext(positions[:rows], slots[:rows], DecodeRows(lens[:rows], tables[:rows]), prefill=None)
        return ids[:rows], context

    assert recorded.prepare(3, inputs, None, limit=PATIENCE) == 3
    assert recorded.has_equal_rows
    assert all(bool((cache.k == 0.5).all() and (cache.v == 0.5).all()) for cache in caches), "nothing was computed"
    lens.fill_(1)
    positions.fill_(0)
    tables.copy_(torch.arange(8, dtype=torch.int32).view(4, 2))
    for rows in (3, 1, 2, 3):
        ids.copy_(torch.arange(4) + rows)
        slots.copy_(tables[:, 0] * 16)
        got = recorded.run(rows, pytest.fail)
        assert got is not None
        hidden = model.forward(*inputs(rows), expected_caches)
        assert torch.equal(got.hidden, hidden)
        assert got.logits is not None
        assert torch.equal(got.logits, model.compute_logits(hidden))
    for ours, others in zip(caches, expected_caches, strict=True):
        assert torch.equal(ours.k, others.k)
    assert sorted(recorded._recordings) == [(1, None), (2, None), (3, None)]


@torch.inference_mode()
def test_no_more_is_recorded_before_serving_than_there_is_time_for() -> None:
    model = model_of("int8")
    caches = allocate_kv_caches(WIDE, 8, 16, dtype=torch.float32, device=CPU, ops=model.runtime.ops)
    recorded = RecordedDecode(model, caches, model.runtime.ops.library)
    seconds = itertools.count()
    ids, lens, tables = (torch.zeros(shape, dtype=torch.int32) for shape in (80, 80, (80, 2)))
    ids = ids.long()

    def inputs(rows: int) -> tuple[torch.Tensor, ForwardContext]:
        context = ForwardContext(ids[:rows], ids[:rows], DecodeRows(lens[:rows], tables[:rows]), prefill=None)
        return ids[:rows], context

    assert recorded.prepare(80, inputs, None, limit=6.0, clock=lambda: float(next(seconds))) == 5
    assert len(recorded._recordings) == 5
    assert recorded.prepare(80, inputs, None, limit=PATIENCE) == 64, "steps of more rows are not recorded at all"


def test_an_engine_that_recorded_its_steps_before_serving_records_none_while_it_serves() -> None:
    model = model_of("int8")
    config = engine_kit.make_config(vocab_size=WIDE.vocab_size, max_num_seqs=6, block_size=16)
    outputs = []
    for prepares in (False, True):
        caches = allocate_kv_caches(
            WIDE, config.num_blocks, config.block_size, dtype=torch.float32, device=CPU, ops=model.runtime.ops
        )
        runner = ModelRunner(model, caches, config, CpuDevice())
        if prepares:
            assert runner.record_steps(PATIENCE) == 6
            assert runner.has_equal_rows
        before = len(runner._decodes._recordings)
        engine = Engine(config, runner)
        for handle in range(9):
            shared = {"seed": handle, "max_tokens": 2 + handle, "ignore_eos": True, "temperature": handle % 2}
            engine.add(engine_kit.make_request(handle, [handle + 3, 5, 8], **shared))
        outputs.append(engine_kit.run(engine).tokens)
        late = len(runner._decodes._recordings) - before
        assert late == 0 if prepares else late > 3
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize(
    ("config", "op"), [(WIDE, "w8a16_gemm"), (MIXTURE, "fused_moe_wna16"), (MIXTURE, "topk_softmax")]
)
@torch.inference_mode()
def test_a_model_that_computes_with_torch_is_left_to_others(config: ModelConfig, op: str) -> None:
    model = model_of("int8", config, **{op: "torch"})
    caches = allocate_kv_caches(WIDE, 8, 16, dtype=torch.float32, device=CPU, ops=model.runtime.ops)
    recorded = RecordedDecode(model, caches, model.runtime.ops.library)
    ids = torch.zeros(2, dtype=torch.int64)
    lens, tables = torch.ones(2, dtype=torch.int32), torch.arange(4, dtype=torch.int32).view(2, 2)
    context = ForwardContext(ids, ids, DecodeRows(lens, tables), prefill=None)
    for _ in range(2):
        assert recorded.run(2, lambda n: (ids, context)) is None


def test_recorded_draws_are_those_of_torch() -> None:
    """Rows change hands, and steps in which a row wants more than a token come between those that are recorded."""
    kinds: list[dict[str, object]] = [
        {"temperature": 0.0},
        {"temperature": 0.8, "top_p": 0.9},
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 1.0, "logprobs": 2, "max_tokens": 4},
        {"temperature": 0.7, "min_p": 0.1},
        {"temperature": 0.0, "presence_penalty": 1.5, "max_tokens": 6},
        {"temperature": 1.5, "grammar": "start: /[a-f]{3,20}/"},
    ]
    compiler = LlGrammarCompiler(VOCABULARY, {engine_kit.EOS})
    compiler.start("start: /[a-f]{3,20}/", [[]]).matchers()
    outputs = []
    for overrides in ({}, {"sample": "torch", "apply_logits_processors_": "torch"}):
        model = model_of("int8", **overrides)
        config = engine_kit.make_config(vocab_size=WIDE.vocab_size, max_num_seqs=4, block_size=16)
        caches = allocate_kv_caches(
            WIDE, config.num_blocks, config.block_size, dtype=torch.float32, device=CPU, ops=model.runtime.ops
        )
        runner = ModelRunner(model, caches, config, CpuDevice())
        engine = Engine(config, runner, grammars=compiler)
        for handle in range(14):
            shared = {"seed": handle, "max_tokens": 6 + handle, "ignore_eos": True}
            engine.add(engine_kit.make_request(handle, [handle + 3, 5, 8], **(shared | kinds[handle % 7])))
        outputs.append(engine_kit.run(engine).tokens)
        recorded = {draw.__name__ for _, draw in runner._decodes._recordings if draw is not None}
        assert recorded == {"_draw", "_draw_masked"}
        assert any(step.result.drawn for step in runner._decodes._recordings.values()) is (not overrides)
    compiler.close()
    assert outputs[0] == outputs[1]
