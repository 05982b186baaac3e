"""An engine whose runner is rank 0 of several, each a thread: the same answers as with one rank.

Sums over ranks round otherwise than one long sum does, so a draw between two tokens that are nearly equal may end
otherwise. Here none is that close: answers stay the same with weights that are moved by far more.
"""

from __future__ import annotations

import queue
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

import engine_kit
from grammar_kit import json_grammar, make_compiler, steps
from ranks_kit import fake_shards, run_ranks
from runner_kit import CPU, MODEL, make_runner, with_experts
from scalellm.kernels import Capability, Ops, select_ops
from scalellm.services.executor.engine import Engine, EngineConfig, SwapCost
from scalellm.services.executor.engine.speculation import Speculator
from scalellm.services.executor.engine.step_result import StepResult
from scalellm.services.executor.engine.step_warm_up import fit_step_times
from scalellm.services.executor.grammar import LlGrammarCompiler
from scalellm.services.executor.models import CausalLM, ModelConfig, ModelRuntime, allocate_kv_caches
from scalellm.services.executor.models.shard import Shard
from scalellm.services.executor.models.weight_slot import finish_all
from scalellm.services.executor.ranks.following import follow
from scalellm.services.executor.ranks.leading_runner import LeadingRunner, RanksApartError
from scalellm.services.executor.ranks.told_masks import ToldMasks
from scalellm.services.executor.runner import CpuDevice, Device, FakeCudaDevice, ModelRunner
from scalellm.services.executor.runner.warm_up import run_largest_step, warm_up
from scalellm.v1 import ranks_pb2
from speculation_kit import make_speculator

SMOLLM2_HEADS = replace(MODEL, num_heads=9, num_kv_heads=3, intermediate_size=96)
MIXTRAL = replace(
    MODEL,
    architecture="MixtralForCausalLM",
    num_experts=4,
    num_experts_per_token=2,
    moe_intermediate_size=48,
    norm_topk_prob=True,
    sparse_layers=(True, True),
)
QWEN3_MOE = replace(
    MIXTRAL, architecture="Qwen3MoeForCausalLM", intermediate_size=64, qk_norm=True, sparse_layers=(False, True)
)
WIDE = replace(MODEL, hidden_size=64, intermediate_size=96, num_heads=2, num_kv_heads=1, head_dim=32)
TORCH = Ops()
DEVICES: dict[str, Callable[[], Device]] = {"cpu": CpuDevice, "graphs": FakeCudaDevice}
SHAPE = json_grammar('{"type": "array", "maxItems": 3, "items": {"enum": ["red", "green", 3, null, true]}}')


def make_model(config: ModelConfig, shard: Shard, moved: float = 0.0, ops: Ops = TORCH) -> CausalLM:
    """Return a rank's share of a model of random weights, each of which is moved by up to a share `moved` of it."""
    whole, generator = CausalLM(config, ModelRuntime()), torch.Generator().manual_seed(0)
    weights = {}
    for slot in whole.weight_slots():
        weight = torch.randn(slot.dest.shape, generator=generator) * (0.35 if slot.dest.dim() > 1 else 1.0)
        weights[slot.name] = weight
    for weight in weights.values():
        weight *= 1 + moved * (2 * torch.rand(weight.shape, generator=generator) - 1)
    model = CausalLM(config, ModelRuntime(ops, shard=shard))
    for slot in model.weight_slots():
        slot.dest.copy_(weights[slot.name][slot.window or ...])
    finish_all(model.weight_slots())
    return model


def engine_config(config: ModelConfig, **changes: object) -> EngineConfig:
    settings = {"block_size": 16, "max_model_len": 96, "num_blocks": 64, "max_num_seqs": 12} | changes
    return engine_kit.make_config(
        vocab_size=config.vocab_size, eos_token_ids=frozenset(config.eos_token_ids), max_logprobs=5, **settings
    )


def requests(count: int = 14) -> Iterator[Any]:
    """Prompts that share beginnings, and every kind of sampling."""
    rng = random.Random(3)
    common = [rng.randrange(3, 97) for _ in range(33)]
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.9},
        {"temperature": 0.8, "top_k": 9, "top_p": 0.9, "min_p": 0.02},
        {"temperature": 0.7, "n": 3},
        {"temperature": 0.0, "repetition_penalty": 1.3, "presence_penalty": 0.4},
        {"temperature": 0.6, "logprobs": 3, "prompt_logprobs": 2},
        {"temperature": 0.0, "logit_bias": {5: 3.0}, "min_tokens": 4},
    ]
    for number in range(count):
        prompt = common[: 33 * (number % 2)] + [rng.randrange(3, 97) for _ in range(3 + number)]
        options = {"max_tokens": 24, "seed": number, "ignore_eos": True} | kinds[number % len(kinds)]
        request = engine_kit.make_request(number, prompt, **options)
        yield replace(request, grammar=SHAPE) if number % 5 == 4 else request


def serve(engine: Engine) -> engine_kit.Collector:
    collector = engine_kit.Collector()
    for number, request in enumerate(requests()):
        engine.add(request)
        if number % 3 == 2:
            collector.take(engine.step())
    for result in steps(engine):
        assert result.error is None, result.error
        collector.take(result)
        engine.check_integrity()
    return collector


class Ranks:
    """A group whose ranks are threads; plans travel as bytes, through queues."""

    def __init__(
        self, config: ModelConfig, limits: EngineConfig, make_device: Callable[[], Device], ops: Ops = TORCH
    ) -> None:
        self._config = config
        self._limits = limits
        self._make_device = make_device
        self._ops = ops
        self.plan_bytes: list[int] = []

    def run(self, shards: list[Shard], lead: Callable[[LeadingRunner], Any]) -> Any:
        """Return what `lead` does with rank 0's runner, while the others follow."""
        queues: list[queue.SimpleQueue[bytes | None]] = [queue.SimpleQueue() for _ in shards[1:]]

        def tell(plan: ranks_pb2.RankPlan) -> None:
            payload = plan.SerializeToString()
            self.plan_bytes.append(len(payload))
            for told in queues:
                told.put(payload)

        def of_rank(shard: Shard) -> Any:
            model, device = make_model(self._config, shard, ops=self._ops), self._make_device()
            limits = self._limits
            run_largest_step(model, limits, device, torch.float32)
            caches = allocate_kv_caches(
                model.rank_config,
                limits.num_blocks,
                limits.block_size,
                dtype=torch.float32,
                device=device.torch_device,
                ops=self._ops,
            )
            if shard.rank == 0:
                try:
                    return lead(LeadingRunner(model, caches, limits, device, tell))
                finally:
                    for told in queues:
                        told.put(None)
            masks = ToldMasks(limits.max_num_seqs, limits.vocab_size)
            runner = ModelRunner(model, caches, limits, device, masks=masks)
            plans = map(ranks_pb2.RankPlan.FromString, iter(queues[shard.rank - 1].get, None))
            return follow(plans, runner, masks, limits)

        return run_ranks(shards, of_rank)[0]


@pytest.fixture(scope="module")
def compiler() -> Iterator[LlGrammarCompiler]:
    made = make_compiler()
    yield made
    made.close()


OneRank = Callable[..., engine_kit.Collector]


@pytest.fixture(scope="module")
def one_rank(compiler: LlGrammarCompiler) -> OneRank:
    """Answers of an engine of one rank on the CPU; asked again, they are not computed again."""
    known: dict[str, engine_kit.Collector] = {}

    def ask(config: ModelConfig, limits: EngineConfig, moved: float = 0.0, ops: Ops = TORCH) -> engine_kit.Collector:
        key = repr((config, limits, moved, ops is TORCH))
        if key not in known:
            runner = make_runner(make_model(config, Shard(), moved, ops), limits, CpuDevice())
            known[key] = serve(Engine(limits, runner, grammars=compiler))
        return known[key]

    return ask


DEAR = pytest.mark.slow  # as the same ranks on the CPU, and other ranks with graphs, are tried each time


@pytest.mark.parametrize(
    ("config", "size", "experts", "device"),
    [
        pytest.param(MODEL, 2, 1, "cpu", id="llama-2-cpu"),
        pytest.param(MODEL, 2, 1, "graphs", id="llama-2-graphs"),
        pytest.param(SMOLLM2_HEADS, 3, 1, "cpu", id="smollm2-3-cpu"),
        pytest.param(SMOLLM2_HEADS, 3, 1, "graphs", id="smollm2-3-graphs", marks=DEAR),
        pytest.param(MIXTRAL, 2, 2, "cpu", id="mixtral-2-2-cpu"),
        pytest.param(MIXTRAL, 2, 2, "graphs", id="mixtral-2-2-graphs"),
        pytest.param(QWEN3_MOE, 4, 2, "cpu", id="qwen3-moe-4-2-cpu"),
        pytest.param(QWEN3_MOE, 4, 2, "graphs", id="qwen3-moe-4-2-graphs", marks=DEAR),
    ],
)
def test_answers_are_those_of_one_rank(
    config: ModelConfig, size: int, experts: int, device: str, compiler: LlGrammarCompiler, one_rank: OneRank
) -> None:
    limits = engine_config(config, num_blocks=14)
    expected, moved = one_rank(config, limits), one_rank(config, limits, moved=1e-5)
    assert moved.tokens == expected.tokens, "a draw of this test is too close to tell the ranks' rounding from a fault"

    def lead(runner: LeadingRunner) -> tuple[engine_kit.Collector, Engine]:
        if runner.overlaps:
            runner.capture_graphs()
        engine = Engine(limits, runner, grammars=compiler)
        return serve(engine), engine

    ranks = Ranks(config, limits, DEVICES[device])
    got, engine = ranks.run(fake_shards(size, experts), lead)
    assert got.tokens == expected.tokens
    assert {key: f.status for key, f in got.finished.items()} == {key: f.status for key, f in expected.finished.items()}
    stats = engine.stats()
    assert stats.preemptions > 0
    assert stats.prefix_cache_hits > 0
    assert sum(ranks.plan_bytes) / stats.steps < 600


@pytest.mark.parametrize("device", DEVICES)
def test_blocks_go_to_the_hosts_memory_of_all_ranks(
    device: str, compiler: LlGrammarCompiler, one_rank: OneRank
) -> None:
    limits = engine_config(MODEL, num_blocks=14, num_host_blocks=40)
    expected = one_rank(MODEL, engine_config(MODEL))

    def lead(runner: LeadingRunner) -> tuple[engine_kit.Collector, Engine]:
        clock = engine_kit.SimClock()
        launch = runner.launch

        def launch_and_tick(batch: Any) -> Any:
            clock.advance(0.001 + 0.01 * batch.num_prefill_tokens)
            return launch(batch)

        runner.launch = launch_and_tick  # type: ignore[method-assign]
        cost = SwapCost(bytes_per_block=1, bytes_per_second=1e9)
        engine = Engine(limits, runner, clock, cost, grammars=compiler)
        return serve(engine), engine

    got, engine = Ranks(MODEL, limits, DEVICES[device]).run(fake_shards(2), lead)
    assert engine.stats().swaps > 0
    assert got.tokens == expected.tokens


def test_warm_up_is_done_by_all_ranks(compiler: LlGrammarCompiler, one_rank: OneRank) -> None:
    """Warm-up captures graphs, serves every kind of request, copies blocks, and leaves runners that serve."""
    limits = engine_config(MODEL)
    expected = one_rank(MODEL, limits)

    def lead(runner: LeadingRunner) -> engine_kit.Collector:
        warm_up(runner, limits, lambda line: None, compiler)
        return serve(Engine(limits, runner, grammars=compiler, step_times=fit_step_times(limits, runner)))

    assert Ranks(MODEL, limits, FakeCudaDevice).run(fake_shards(2), lead).tokens == expected.tokens


@pytest.fixture(scope="module")
def cpp() -> Ops:
    ops = select_ops(Capability.of(CPU), dtype=torch.float32)
    if ops.library is None:
        pytest.skip("there is no compiler")
    return ops


def told(collector: engine_kit.Collector) -> tuple[object, ...]:
    return collector.tokens, collector.logprobs, collector.samples, collector.prompt_logprobs


@pytest.mark.parametrize("config", [WIDE, with_experts(WIDE)], ids=["dense", "experts"])
def test_answers_with_drafts_are_those_without_to_the_last_bit(
    config: ModelConfig, cpp: Ops, compiler: LlGrammarCompiler, one_rank: OneRank
) -> None:
    limits = engine_config(config, num_blocks=14)
    alone, moved = one_rank(config, limits, ops=cpp), one_rank(config, limits, moved=1e-5, ops=cpp)
    assert moved.tokens == alone.tokens, "a draw of this test is too close to tell the ranks' rounding from a fault"

    def of_ranks(speculator: Speculator | None) -> tuple[engine_kit.Collector, Engine]:
        def lead(runner: LeadingRunner) -> tuple[engine_kit.Collector, Engine]:
            engine = Engine(limits, runner, grammars=compiler, speculator=speculator)
            return serve(engine), engine

        return Ranks(config, limits, CpuDevice, cpp).run(fake_shards(2), lead)  # type: ignore[no-any-return]

    guesses = make_speculator(
        "random", oracle=lambda request, index: alone.tokens[request.key, index], vocab_size=config.vocab_size
    )
    expected, _ = of_ranks(None)
    got, engine = of_ranks(guesses)
    assert got.tokens == alone.tokens
    assert told(got) == told(expected)
    stats = engine.stats()
    assert stats.preemptions > 0
    assert 0 < stats.accepted_tokens < stats.draft_tokens


def test_ranks_make_no_drafts_where_torch_adds_up_rows(compiler: LlGrammarCompiler, one_rank: OneRank) -> None:
    limits = engine_config(MODEL)
    alone = one_rank(MODEL, limits)

    def lead(runner: LeadingRunner) -> tuple[engine_kit.Collector, Engine]:
        engine = Engine(limits, runner, grammars=compiler, speculator=make_speculator("suffix"))
        return serve(engine), engine

    got, engine = Ranks(MODEL, limits, CpuDevice).run(fake_shards(2), lead)
    assert got.tokens == alone.tokens
    assert (engine.stats().draft_tokens, engine.stats().speculation) == (0, "idle")


def test_a_step_that_fails_ends_the_group(compiler: LlGrammarCompiler) -> None:
    """The other ranks may wait in the midst of it: no step can succeed any more."""
    limits = engine_config(MODEL)

    def lead(runner: LeadingRunner) -> StepResult:
        runner.copy_blocks([(0, 1)])
        with pytest.raises(RanksApartError):
            runner.check_device()
        return StepResult()

    Ranks(MODEL, limits, CpuDevice).run(fake_shards(2), lead)
