"""Answers of random shapes at temperature 2, with the vocabulary of SmolLM2, side by side with answers of none.

The small model has random weights: of what a mask allows it draws about anything, so it looks for holes in masks no
worse than a trained one does. The slow test takes five hundred shapes and the real one.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import engine_kit
from engine_kit import Collector
from grammar_kit import steps
from random_schemas import ShapeCase, other_cases, schema_cases
from runner_kit import CPU, MODEL, make_runner
from scalellm.kernels import select_ops
from scalellm.kernels.capability import Capability
from scalellm.services.common.vocabulary import Vocabulary, read_vocabulary
from scalellm.services.executor.build import build_engine
from scalellm.services.executor.config import ExecutorSettings
from scalellm.services.executor.engine import Engine, EngineRequest, FinishReason, RequestStatus
from scalellm.services.executor.grammar import LlGrammarCompiler
from scalellm.services.executor.models import ModelRuntime, Quantization
from scalellm.services.executor.models.dummy import dummy_model
from scalellm.services.executor.runner import CpuDevice

VOCAB_SIZE, EOS = 49152, 2
ROWS = 64
NEIGHBOURS_PER_BATCH = 4
PROMPT = [504, 2365, 282]


@pytest.fixture(scope="module")
def vocabulary(model_dir: Callable[[str], Path]) -> Vocabulary:
    return read_vocabulary(model_dir("smollm2-135m-instruct"), VOCAB_SIZE)


@pytest.fixture(scope="module")
def small_engine(vocabulary: Vocabulary) -> Iterator[Engine]:
    shape = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32, "num_layers": 1, "sliding_layers": (False,)}
    described = replace(MODEL, vocab_size=VOCAB_SIZE, max_position_embeddings=512, eos_token_ids=(EOS,), **shape)
    ops = select_ops(Capability.of(CPU), dtype=torch.float32)
    model = dummy_model(described, ModelRuntime(ops, quantization=Quantization("int8")))
    config = engine_kit.make_config(
        vocab_size=VOCAB_SIZE,
        eos_token_ids=frozenset({EOS}),
        block_size=16,
        num_blocks=1200,
        max_model_len=512,
        max_num_seqs=ROWS,
        max_num_batched_tokens=256,
    )
    compiler = LlGrammarCompiler(vocabulary, {EOS})
    yield Engine(config, make_runner(model, config, CpuDevice()), grammars=compiler)
    compiler.close()


def run(engine: Engine, requests: Sequence[EngineRequest]) -> Collector:
    for request in requests:
        engine.add(request)
    collector = Collector()
    for result in steps(engine):
        collector.take(result)
    engine.check_integrity()
    assert engine.load().free_blocks == engine.load().total_blocks
    return collector


def ask(handle: int, rng: random.Random, grammar: str, **changes: object) -> EngineRequest:
    fields = {"temperature": 2.0, "seed": rng.getrandbits(32), "max_tokens": 120, "grammar": grammar, **changes}
    return engine_kit.make_request(
        handle, [*PROMPT, *(rng.randrange(100, 40_000) for _ in range(rng.randint(0, 9)))], **fields
    )


def attack(engine: Engine, vocabulary: Vocabulary, cases: Sequence[ShapeCase], seed: int) -> Counter[str]:
    """Ask for all shapes, in batches, and check every answer. Returns how the samples ended."""
    rng = random.Random(seed)
    cases = rng.sample(cases, len(cases))
    counts = Counter[str]()
    while cases:
        shaped: dict[int, tuple[EngineRequest, ShapeCase]] = {}
        while cases and sum(request.sampling.n for request, _ in shaped.values()) < ROWS - NEIGHBOURS_PER_BATCH:
            case, handle = cases.pop(), len(shaped)
            most = rng.choice((3, 120, 120, 250))
            shaped[handle] = ask(handle, rng, case.grammar, n=rng.randint(1, 8), max_tokens=most), case
        free = [ask(1000 + number, rng, "", max_tokens=60) for number in range(NEIGHBOURS_PER_BATCH)]
        together = run(
            engine, rng.sample([*(request for request, _ in shaped.values()), *free], len(shaped) + len(free))
        )
        for request, case in shaped.values():
            finish = together.finished[request.key]
            assert finish.status is RequestStatus.OK, (case.name, finish.message)
            for index in range(request.sampling.n):
                counts[check(engine, vocabulary, together, request, index, case)] += 1
        for request in free:
            alone = run(engine, [request])
            place = (request.key, 0)
            assert together.tokens[place] == alone.tokens[place]
            counts["neighbours"] += 1
    return counts


def check(
    engine: Engine, vocabulary: Vocabulary, collector: Collector, request: EngineRequest, index: int, case: ShapeCase
) -> str:
    """A complete answer has its shape, one that is not is as long as it may be. Returns which of both it is."""
    place = (request.key, index)
    token_ids, reason = collector.tokens[place], collector.samples[place].reason
    if reason is FinishReason.LENGTH:
        assert len(token_ids) == request.sampling.max_tokens
        assert not engine.config.eos_token_ids & set(token_ids)
        return "length"
    assert reason is FinishReason.STOP
    assert token_ids[-1] in engine.config.eos_token_ids  # the real model has two
    text = b"".join(vocabulary.tokens[token_id] for token_id in token_ids[:-1]).decode()
    assert case.has_shape(text), f"{case.name}: {text!r}"
    return "stop"


def test_each_complete_answer_has_its_shape_and_its_neighbours_are_as_they_are_alone(small_engine, vocabulary) -> None:
    cases = [*schema_cases(12), *random.Random(1).sample(other_cases(), 6)]
    counts = attack(small_engine, vocabulary, cases, 1)
    assert min(counts["stop"], counts["length"]) > 10, counts


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("is_real", [False, True], ids=["small", "SmolLM2"])
def test_five_hundred_shapes(small_engine, vocabulary, model_dir, is_real: bool) -> None:
    engine = small_engine
    if is_real:
        settings = ExecutorSettings(
            model=str(model_dir("smollm2-135m-instruct")), num_blocks=1200, max_model_len=512, num_threads=1
        )
        engine = build_engine(settings, lambda line: None).engine
    counts = attack(engine, vocabulary, [*schema_cases(500), *other_cases()], 2)
    assert min(counts["stop"], counts["length"], counts["neighbours"]) > 100, counts
