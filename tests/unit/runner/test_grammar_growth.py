"""Grammars that are to cost as much as can be leave nothing behind, however many come."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from typing import Any, ClassVar

import pytest
from llguidance import LLMatcher

import engine_kit
from bench.hostile_grammars import HOSTILE
from engine_kit import Collector
from grammar_kit import ids_of, make_compiler, steps
from runner_kit import MODEL, make_runner, random_model
from scalellm.services.executor.engine import Engine, EngineRequest
from scalellm.services.executor.engine.sequence import Sequence, SequenceGroup
from scalellm.services.executor.grammar.compiler import LlCompilation
from scalellm.services.executor.grammar.matcher import LlMatcher
from scalellm.services.executor.runner import CpuDevice

NAMES = (
    *("complements", "intersections", "ambiguous", "nested counts", "counts in JSON", "recursive"),
    *("alternatives of alternatives", "deep", "large enum", "long"),
)
ROUNDS = 6
"""Rounds of as many grammars as `NAMES`, all of them different: more than are kept after four."""

MOST_KEPT = 32


class Compiled:
    """A compiled grammar that can be counted."""

    alive: ClassVar[weakref.WeakSet[Compiled]] = weakref.WeakSet()

    def __init__(self, *args: Any, **options: Any) -> None:
        self._inner = LLMatcher(*args, **options)
        self.alive.add(self)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def living() -> Counter[str]:
    gc.collect()
    kinds = (LlMatcher, LlCompilation, EngineRequest, Sequence, SequenceGroup)
    return Counter(type(one).__name__ for one in gc.get_objects() if type(one) in kinds)


@pytest.mark.slow
def test_however_many_come_nothing_of_them_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scalellm.services.executor.grammar.compiler.LLMatcher", Compiled)
    compiler = make_compiler()
    config = engine_kit.make_config(
        vocab_size=MODEL.vocab_size, eos_token_ids=frozenset(MODEL.eos_token_ids), block_size=16, max_model_len=96,
        num_blocks=96, max_num_seqs=24,
    )  # fmt: skip
    engine = Engine(config, make_runner(random_model(), config, CpuDevice()), grammars=compiler)

    def run(number: int) -> Collector:
        collector = Collector()
        for place, name in enumerate(NAMES):
            grammar = f"{HOSTILE[name]}\n// {number}\n"
            handle = number * len(NAMES) + place
            engine.add(engine_kit.make_request(handle, ids_of("Say"), grammar=grammar, max_tokens=6, n=2, seed=handle))
        for result in steps(engine):
            collector.take(result)
        return collector

    before, free = living(), engine.load().free_blocks
    for number in range(ROUNDS):
        assert len(run(number).finished) == len(NAMES)
        assert living() == before
        assert engine.load().free_blocks == free
    gc.collect()
    assert len(Compiled.alive) == MOST_KEPT
    compiler.close()
