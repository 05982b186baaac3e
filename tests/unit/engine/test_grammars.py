"""Samples with a grammar that are preempted, given back, or lost with their engine go on as if nothing had been.

There is no model: of the tokens that a mask allows one is chosen by a script, so that every answer is known beforehand.
"""

from __future__ import annotations

import functools
import gc
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest

import engine_kit
from engine_kit import Collector, SimClock
from scalellm.services.executor.engine import Engine, EngineRequest, FinishReason, RequestStatus, ResumedSample
from scalellm.services.executor.grammar.matcher import LlMatcher
from shaped_answers import EOS, GRAMMARS, SIZE, CompilesAtOnce, compiler, problem, shaped_tokens
from virtual_services import ScriptedRunner, script, scripted_token

NUM_SHAPED = 50


def make_engine(*, overlaps: bool, num_blocks: int = 400) -> Engine:
    config = engine_kit.make_config(
        vocab_size=SIZE,
        eos_token_ids=frozenset({EOS}),
        num_blocks=num_blocks,
        max_model_len=128,
        max_num_seqs=24,
        max_num_batched_tokens=64,
    )
    clock = SimClock()
    runner = ScriptedRunner(config.max_num_seqs, clock, overlaps=overlaps)
    return Engine(config, runner, clock, grammars=CompilesAtOnce())


def requests() -> Iterator[EngineRequest]:
    """Every seventh may say anything."""
    rng = random.Random(5)
    for handle in range(NUM_SHAPED + NUM_SHAPED // 6):
        grammar = "" if handle % 7 == 6 else rng.choice(GRAMMARS)
        prompt = [rng.randrange(1, SIZE) for _ in range(rng.randint(1, 30))]
        changes = {"n": rng.choice((1, 1, 2, 3)), "max_tokens": rng.randint(10, 60), "ignore_eos": not grammar}
        yield engine_kit.make_request(handle, prompt, grammar=grammar, seed=handle, **changes)


@functools.cache
def due(handle: int) -> dict[int, list[int]]:
    """The tokens of each sample of a request that nothing disturbs."""
    request = REQUESTS[handle]
    sampling, found = request.sampling, {}
    for index in range(sampling.n):
        last, most = request.prompt_token_ids[-1], sampling.max_tokens
        if request.grammar:
            found[index] = shaped_tokens(request.grammar, functools.partial(script, handle, index), last, most)
        else:
            ids = [last]
            for offset in range(most):
                ids.append(scripted_token(handle, index, offset, ids[-1]))
            found[index] = ids[1:]
    return found


REQUESTS = list(requests())


@dataclass
class Answers:
    """A client's tokens of each sample, over all engines that worked on it."""

    tokens: dict[tuple[int, int], list[int]]
    finished: dict[tuple[int, int], FinishReason]

    def rest(self, request: EngineRequest) -> EngineRequest | None:
        """Return the request for the next engine; None if nothing is left to do."""
        handle, count = request.key[1], request.sampling.n
        resumed = tuple(
            ResumedSample(index, tuple(self.tokens[handle, index]), self.finished.get((handle, index)))
            for index in range(count)
            if self.tokens.get((handle, index))
        )
        is_over = all((handle, index) in self.finished for index in range(count))
        return None if is_over else replace(request, resumed=resumed)

    def take(self, collector: Collector) -> None:
        for ((_, handle), index), ids in collector.tokens.items():
            self.tokens.setdefault((handle, index), []).extend(ids)
        for ((_, handle), index), sample in collector.samples.items():
            self.finished[handle, index] = sample.reason


def check(answers: Answers) -> None:
    """Each answer is that of the undisturbed run, and has its shape."""
    for request in REQUESTS:
        handle = request.key[1]
        for index, wanted in due(handle).items():
            ids = answers.tokens[handle, index]
            assert ids == wanted, (handle, index)
            if request.grammar:
                assert not problem(request.grammar, ids, request.sampling.max_tokens)


def num_matchers() -> int:
    gc.collect()
    return sum(type(found) is LlMatcher for found in gc.get_objects())


@pytest.fixture(autouse=True)
def _no_matcher_stays() -> Iterator[None]:
    before = num_matchers()
    yield
    assert num_matchers() == before


@pytest.fixture(params=["masks within steps", "masks before steps"])
def masks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Either all matchers are quick, or none ever is, so that no mask is computed within a step."""
    is_slow = request.param == "masks before steps"
    name, value = ("_QUICK_S", -1.0) if is_slow else ("_NUM_TO_PROVE", 0)
    monkeypatch.setattr(f"scalellm.services.executor.grammar.matcher.{name}", value)
    compiler().close()  # in other tests of this process its grammars' masks may have proved quick
    compiler.cache_clear()
    made, has_mask = [], LlMatcher.has_mask

    def counted(*args: Any) -> bool:
        made.append(args)
        return has_mask(*args)

    monkeypatch.setattr(LlMatcher, "has_mask", counted)
    yield
    assert (len(made) > 100) == is_slow
    made.clear()


def check_at_rest(engine: Engine) -> None:
    load = engine.load()
    assert (load.free_blocks, load.running, load.waiting) == (load.total_blocks, 0, 0)
    assert not engine.has_unfinished()
    assert not engine.only_awaits_grammars


@pytest.mark.usefixtures("masks")
@pytest.mark.parametrize("overlaps", [False, True])
def test_preemption_changes_nothing(overlaps: bool) -> None:
    engine, answers = make_engine(overlaps=overlaps, num_blocks=50), Answers({}, {})
    for request in REQUESTS:
        engine.add(request)
    answers.take(engine_kit.run(engine))
    assert engine.stats().preemptions > 5
    check(answers)
    check_at_rest(engine)


@pytest.mark.usefixtures("masks")
@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("is_drained", [False, True])
def test_an_engine_that_is_lost_or_leaves_changes_nothing(overlaps: bool, is_drained: bool) -> None:
    """Several do, one after the other, in the middle of steps; what was not told yet is computed again."""
    answers, rng = Answers({}, {}), random.Random(3)
    for life in range(8):
        is_last = life == 7
        engine, collector = make_engine(overlaps=overlaps, num_blocks=120), Collector()
        rests = [rest for request in REQUESTS if (rest := answers.rest(request)) is not None]
        for rest in rests:
            engine.add(rest)
        if is_last:
            engine_kit.run(engine, collector)
        else:
            for _ in range(rng.randint(5, 25)):
                collector.take(engine.step())
        if is_drained:
            running = [rest.key for rest in rests if engine.has_request(rest.key)]
            engine.give_all_back("it leaves")
            engine_kit.run(engine, collector)
            assert {collector.finished[key].status for key in running} <= {RequestStatus.MOVED}
            check_at_rest(engine)
        answers.take(collector)
    check(answers)
