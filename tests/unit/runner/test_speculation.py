"""Answers of a real model with drafts, against the same without: tokens, log-probabilities and ends, bit by bit."""

import functools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import engine_kit
from grammar_kit import ids_of, json_grammar, make_compiler, steps
from runner_kit import CPU, MODEL, with_experts
from scalellm.kernels import Capability, select_ops
from scalellm.kernels.dispatch import Backend
from scalellm.services.executor.engine import Engine, EngineConfig, EngineRequest
from scalellm.services.executor.engine.speculation import Speculator
from scalellm.services.executor.grammar import LlGrammarCompiler
from scalellm.services.executor.models import CausalLM, ModelRuntime, Quantization, allocate_kv_caches, dummy_model
from scalellm.services.executor.runner import CpuDevice, Device, FakeCudaDevice, ModelRunner
from speculation_kit import DRAFTERS, make_speculator

WIDE = replace(MODEL, hidden_size=64, intermediate_size=96, num_heads=2, num_kv_heads=1, head_dim=32)
CONFIG = engine_kit.make_config(
    vocab_size=WIDE.vocab_size, eos_token_ids=frozenset(WIDE.eos_token_ids), block_size=16, num_blocks=12
)


@functools.cache
def model_of(quantization: str, *, experts: bool = False, **overrides: Backend) -> CausalLM:
    ops = select_ops(Capability.of(CPU), dtype=torch.float32, overrides=overrides)
    if ops.library is None:
        pytest.skip("there is no compiler")
    runtime = ModelRuntime(ops, quantization=Quantization(quantization))  # type: ignore[arg-type]
    return dummy_model(with_experts(WIDE) if experts else WIDE, runtime)


def answers(
    model: CausalLM,
    requests: list[EngineRequest],
    speculator: Speculator | None,
    config: EngineConfig = CONFIG,
    device: Device | None = None,
    grammars: LlGrammarCompiler | None = None,
) -> tuple[engine_kit.Collector, Engine]:
    dtype = torch.int8 if model.runtime.quantization.method == "int8" else torch.float32
    caches = allocate_kv_caches(
        WIDE, config.num_blocks, config.block_size, dtype=dtype, device=CPU, ops=model.runtime.ops
    )
    runner = ModelRunner(model, caches, config, device or CpuDevice())
    engine, collector = Engine(config, runner, grammars=grammars, speculator=speculator), engine_kit.Collector()
    for request in requests:
        engine.add(request)
    for result in steps(engine):
        collector.take(result)
    engine.check_integrity()
    return collector, engine


def told(collector: engine_kit.Collector) -> tuple[object, ...]:
    return collector.tokens, collector.logprobs, collector.samples, collector.prompt_logprobs


def as_without(requests: list[EngineRequest], kind: str, collector: engine_kit.Collector, seed: int = 0) -> Speculator:
    """A drafter that knows what came without drafts."""

    def oracle(request: EngineRequest, index: int) -> list[int]:
        return collector.tokens[request.key, index]

    return make_speculator(kind, oracle=oracle, vocab_size=WIDE.vocab_size, seed=seed)


samplings = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from((0.0, 0.3, 1.0, 2.0)),
        "top_k": st.sampled_from((0, 3)),
        "top_p": st.sampled_from((1.0, 0.8)),
        "min_p": st.sampled_from((0.0, 0.1)),
        "n": st.integers(1, 3),
        "seed": st.integers(0, 1000),
        "max_tokens": st.integers(1, 30),
        "min_tokens": st.sampled_from((0, 0, 1)),
        "logprobs": st.sampled_from((None, 0, 2)),
        "prompt_logprobs": st.sampled_from((None, None, 1)),
        "logit_bias": st.sampled_from(({}, {5: 2.0, 2: -5.0})),
        "stop_token_ids": st.sampled_from((frozenset(), frozenset({7, 40}))),
        "ignore_eos": st.booleans(),
        "presence_penalty": st.sampled_from((0.0, 0.0, 0.5)),
    }
)


@pytest.mark.parametrize(("quantization", "experts"), [("int8", False), ("none", False), ("int8", True)])
@settings(max_examples=8)
@given(
    seed=st.integers(0, 1000),
    kind=st.sampled_from(DRAFTERS),
    kinds=st.lists(samplings, min_size=1, max_size=5),
    num_blocks=st.sampled_from((4, 12)),
)
def test_answers_are_those_without_drafts(
    quantization: str, experts: bool, seed: int, kind: str, kinds: list[dict[str, object]], num_blocks: int
) -> None:
    model, config = model_of(quantization, experts=experts), replace(CONFIG, num_blocks=num_blocks)
    requests = [
        engine_kit.make_request(handle, [handle + 3, 5, 8] * (1 + handle), **sampling)
        for handle, sampling in enumerate(kinds)
    ]
    expected, _ = answers(model, requests, None, config)
    got, _ = answers(model, requests, as_without(requests, kind, expected, seed), config)
    assert told(got) == told(expected)


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("quantization", ["int8", "none"])
def test_right_drafts_save_steps_and_wrong_ones_cost_none(quantization: str, experts: bool) -> None:
    model = model_of(quantization, experts=experts)
    requests = [engine_kit.make_request(0, [3, 5, 8], max_tokens=41, ignore_eos=True, temperature=1.0)]
    expected, plain = answers(model, requests, None)
    got = {kind: answers(model, requests, as_without(requests, kind, expected)) for kind in ("right", "wrong")}
    assert all(told(collector) == told(expected) for collector, _ in got.values())
    assert plain.stats().steps == 41
    # The step after the first one finds out whether rows are equal; then there are eight rows for one sequence.
    assert got["right"][1].stats().steps == 2 + -(-39 // CONFIG.max_num_seqs)
    assert got["wrong"][1].stats().steps == 41
    assert got["wrong"][1].stats().accepted_tokens == 0 < got["wrong"][1].stats().draft_tokens
    assert (plain.stats().speculation, got["right"][1].stats().speculation) == ("off", "on")


@pytest.mark.parametrize("experts", [False, True])
def test_preempted_sequences_go_on_with_drafts(experts: bool) -> None:
    model, config = model_of("int8", experts=experts), replace(CONFIG, num_blocks=4)
    requests = [
        engine_kit.make_request(handle, [handle + 3, 5, 8], max_tokens=50, ignore_eos=True, seed=handle)
        for handle in range(4)
    ]
    expected, _ = answers(model, requests, None, config)
    got, engine = answers(model, requests, as_without(requests, "random", expected), config)
    assert told(got) == told(expected)
    assert engine.stats().preemptions > 0
    assert engine.stats().accepted_tokens > 0


def test_where_torch_computes_a_part_of_a_step_there_are_no_drafts() -> None:
    requests = [engine_kit.make_request(0, [3, 5, 8], max_tokens=20, ignore_eos=True)]
    model = model_of("int8", w8a16_gemm="torch")
    expected, _ = answers(model, requests, None)
    _, engine = answers(model, requests, as_without(requests, "right", expected))
    assert (engine.stats().draft_tokens, engine.stats().speculation) == (0, "idle")


def test_where_steps_overlap_there_are_no_drafts() -> None:
    requests = [engine_kit.make_request(0, [3, 5, 8], max_tokens=20, ignore_eos=True)]
    model = model_of("none")
    expected, _ = answers(model, requests, None)
    got, engine = answers(model, requests, as_without(requests, "right", expected), device=FakeCudaDevice())
    assert got.tokens == expected.tokens
    assert engine.stats().draft_tokens == 0


SAYS = "the quick brown fox jumps over the lazy dog"
GRAMMARS = (
    f'start: "{SAYS}" /[a-c]{{2,5}}/',
    "start: /[0-9]{3}(-[0-9]{2}){0,4}/",
    json_grammar('{"enum": ["blue whale", "blue shark", "red panda"]}'),
)


@pytest.mark.parametrize("kind", DRAFTERS)
def test_answers_of_a_given_shape_are_those_without_drafts(kind: str) -> None:
    model, compiler = model_of("int8"), make_compiler()
    config = replace(CONFIG, num_blocks=16)
    requests = [
        engine_kit.make_request(
            handle, [handle + 3, 5, 8], grammar=grammar, max_tokens=60, min_tokens=min_tokens, seed=handle, **sampling
        )
        for handle, (grammar, min_tokens, sampling) in enumerate(
            (grammar, min_tokens, sampling)
            for grammar in (*GRAMMARS, "")
            for min_tokens in (0, 6)
            for sampling in ({"temperature": 0.0}, {"temperature": 1.5, "n": 2, "logprobs": 1})
        )
    ]
    expected, _ = answers(model, requests, None, config, grammars=compiler)
    got, engine = answers(model, requests, as_without(requests, kind, expected, seed=3), config, grammars=compiler)
    compiler.close()
    assert told(got) == told(expected)
    assert engine.stats().draft_tokens > 0
    assert (engine.stats().accepted_tokens > 0) == (kind != "wrong")


def test_a_text_that_a_grammar_leaves_no_choice_about_takes_few_steps() -> None:
    model, compiler = model_of("int8"), make_compiler()
    request = engine_kit.make_request(0, [3, 5, 8], grammar=GRAMMARS[0], max_tokens=60, temperature=1.0)
    expected, plain = answers(model, [request], None, grammars=compiler)
    got, engine = answers(model, [request], as_without([request], "suffix", expected), grammars=compiler)
    compiler.close()
    assert told(got) == told(expected)
    assert got.tokens[request.key, 0][: len(SAYS)] == ids_of(SAYS)
    saved = plain.stats().steps - engine.stats().steps
    assert saved == engine.stats().accepted_tokens >= len(SAYS) * 3 // 4
