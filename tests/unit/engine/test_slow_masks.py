"""Samples whose masks take long sit out steps; all others go on as if those were not there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

import engine_kit
from engine_kit import Collector
from scalellm.services.executor.engine import (
    AbortReason,
    Engine,
    EngineRequest,
    RequestStatus,
    ScheduledBatch,
    SwapCost,
)
from scalellm.services.executor.engine.batch import ScheduledSequence
from scalellm.services.executor.engine.fake_model_runner import STEP_TIME_PRESETS, FakeModelRunner
from scalellm.services.executor.engine.grammar import Compilation, Matcher


class HeldMatcher(Matcher):
    """Allows any token. Its masks are there when the test says so."""

    is_slow = True

    def __init__(self) -> None:
        self.is_held = True
        self.is_cancelled = False
        self.asked_for: set[int] = set()

    def has_mask(self, token_ids: Sequence[int], start: int = 0) -> bool:
        self.asked_for.add(len(token_ids) - start)
        return not self.is_held

    def cancel(self) -> None:
        assert not self.is_cancelled
        self.is_cancelled = True

    def follow(self, token_ids: Sequence[int], start: int = 0) -> None:
        raise AssertionError("only masks need its tokens")

    def num_allowed(self, token_ids: Sequence[int]) -> int:
        raise AssertionError("each guess would take one more mask")

    def forced(self) -> Sequence[int]:
        raise AssertionError("each guess would take one more mask")


class Compiled(Compilation):
    """Done from the beginning."""

    is_done = True

    def __init__(self, matchers: Sequence[Matcher]) -> None:
        self._matchers = matchers

    def matchers(self) -> Sequence[Matcher]:
        return self._matchers

    def cancel(self) -> None:
        """Nothing is under way."""


class HeldGrammars:
    """Compiler and masks of one matcher for each sample."""

    def __init__(self) -> None:
        self.made: list[HeldMatcher] = []
        self.num_filled = 0

    def start(self, grammar: str, outputs: Sequence[Sequence[int]]) -> Compiled:
        matchers = [HeldMatcher() for _ in outputs]
        self.made += matchers
        return Compiled(matchers)

    def fill(self, scheduled: Sequence[ScheduledSequence]) -> Mapping[int, str]:
        drawn = [one.seq.matcher for one in scheduled if one.seq.matcher is not None]
        assert not any(isinstance(matcher, HeldMatcher) and matcher.is_held for matcher in drawn)
        self.num_filled += len(drawn)
        return {}

    def pick(self, place: int, number: int) -> int:
        return 2 + number % 5


@pytest.fixture
def grammars() -> HeldGrammars:
    return HeldGrammars()


@pytest.fixture(params=[False, True], ids=["plain", "overlaps"])
def engine(request: pytest.FixtureRequest, grammars: HeldGrammars) -> Engine:
    config, clock = engine_kit.make_config(enable_prefix_cache=False), engine_kit.SimClock()
    steps = STEP_TIME_PRESETS["instant"]
    runner = FakeModelRunner(
        config.vocab_size, config.eos_token_ids, steps, clock.advance, clock, overlaps=request.param, masks=grammars
    )
    return Engine(config, runner, clock, grammars=grammars)


def add(engine: Engine, handle: int, grammar: str = "", **changes: object) -> EngineRequest:
    request = engine_kit.make_request(handle, [1, 2, 3], grammar=grammar, max_tokens=12, ignore_eos=True, **changes)
    engine.add(request)
    return request


def step(engine: Engine, collector: Collector) -> None:
    collector.take(engine.step())
    engine.check_integrity()


def test_a_sample_sits_out_steps_until_its_mask_is_there_and_nobody_else_does(engine, grammars) -> None:
    held, free = add(engine, 1, "slow"), add(engine, 2)
    collector = Collector()
    for _ in range(14):  # a token a step
        step(engine, collector)
    assert collector.finished[free.key].status is RequestStatus.OK
    assert (held.key, 0) not in collector.tokens
    (matcher,) = grammars.made
    assert matcher.asked_for == {0}
    while not engine.only_awaits_grammars:  # steps that were launched before are still to be waited for
        step(engine, collector)
    steps = engine.stats().steps
    step(engine, collector)
    assert (engine.stats().steps, grammars.num_filled) == (steps, 0)
    matcher.is_held = False
    engine_kit.run(engine, collector)
    assert collector.finished[held.key].status is RequestStatus.OK
    assert (len(collector.tokens[held.key, 0]), grammars.num_filled) == (12, 12)
    assert matcher.asked_for == set(range(12))


def test_one_that_is_cancelled_meanwhile_leaves_nothing(engine, grammars) -> None:
    held, collector = add(engine, 1, "slow", n=2), Collector()
    grammars.made[0].is_held = False
    for _ in range(8):
        step(engine, collector)
    assert len(collector.tokens[held.key, 0]) >= 1
    assert (held.key, 1) not in collector.tokens  # its masks are still held
    engine.abort(held.key, None, AbortReason.CANCELLED)
    engine_kit.run(engine, collector)
    assert collector.finished[held.key].status is RequestStatus.CANCELLED
    load = engine.load()
    assert (load.free_blocks, load.running, load.waiting) == (load.total_blocks, 0, 0)
    assert not engine.only_awaits_grammars


@pytest.mark.parametrize("end", ["abort", "samples", "give back", "link"])
def test_masks_of_samples_that_have_ended_are_cancelled(engine, grammars, end: str) -> None:
    """All tenants' masks wait in one queue."""
    held, collector = add(engine, 1, "slow", n=2), Collector()
    for _ in range(3):
        step(engine, collector)
    assert not any(matcher.is_cancelled for matcher in grammars.made)
    if end == "samples":
        for index in range(2):
            engine.abort(held.key, index)
            assert [matcher.is_cancelled for matcher in grammars.made] == [True, index == 1]
    elif end == "abort":
        engine.abort(held.key)
    elif end == "link":
        engine.drop_link(held.key[0])
    else:
        engine.give_back(held.key, "taken back")
    assert [matcher.is_cancelled for matcher in grammars.made] == [True, True]
    engine_kit.run(engine, collector)


def test_preempted_ones_come_back_only_with_their_masks(grammars) -> None:
    """The cache is too small for all: those that wait for masks lose their blocks, and no mask is drawn from twice."""
    config, clock = engine_kit.make_config(num_blocks=16, enable_prefix_cache=False), engine_kit.SimClock()
    steps = STEP_TIME_PRESETS["instant"]
    runner = FakeModelRunner(config.vocab_size, config.eos_token_ids, steps, clock.advance, clock, masks=grammars)
    engine, collector = Engine(config, runner, clock, grammars=grammars), Collector()
    requests = [add(engine, handle, "slow" if handle % 2 else "") for handle in range(8)]
    for turn in range(400):
        for place, matcher in enumerate(grammars.made):
            matcher.is_held = (turn + place) % 3 > 0
        if not engine.has_unfinished():
            break
        step(engine, collector)
    assert engine.stats().preemptions > 0
    for request in requests:
        assert collector.finished[request.key].status is RequestStatus.OK
        assert len(collector.tokens[request.key, 0]) == 12


def test_blocks_that_are_swapped_out_on_trial_come_back_as_they_were(grammars) -> None:
    """A step may have nothing else to do, where the other suspect only waits for a mask."""
    config = engine_kit.make_config(
        num_blocks=13, num_host_blocks=13, max_model_len=48, max_num_batched_tokens=8, enable_prefix_cache=False
    )
    clock, is_failing = engine_kit.SimClock(), [False]

    def execute(batch: ScheduledBatch) -> None:
        clock.advance(1.0)
        if is_failing[0]:
            is_failing[0] = False
            raise ValueError("once")

    runner = engine_kit.FakePagedRunner(config, on_execute=execute)
    engine, collector = Engine(config, runner, clock, SwapCost(1, 1e9), grammars), Collector()
    first, large, growing = requests = [
        engine_kit.make_request(handle, [handle] * size, n=n, grammar="slow", max_tokens=22, min_tokens=22)
        for handle, size, n in ((1, 2, 1), (2, 25, 1), (3, 5, 2))
    ]
    for request in requests:
        engine.add(request)
    for matcher in grammars.made:
        matcher.is_held = False
    while len(collector.tokens) < 4:
        step(engine, collector)
    is_failing[0] = True
    step(engine, collector)
    *_, large_matcher, _, sibling = grammars.made
    sibling.is_held = True  # so that its request stays on trial
    while not large_matcher.is_held:
        step(engine, collector)
        large_matcher.is_held = any(seq.group.key == large.key for seq in engine._scheduler.running())
    while not any(seq.group.key == growing.key for seq in engine._scheduler.running()):
        step(engine, collector)
    # It takes all blocks but those of the large one, which it may not take, and then gives up its own.
    while any(seq.group.key == growing.key for seq in engine._scheduler.running()):
        step(engine, collector)
    assert len(collector.tokens[growing.key, 0]) > 10
    assert engine.load().running_sequences == 1
    for matcher in grammars.made:
        matcher.is_held = False
    engine_kit.run(engine, collector)
    for request in (first, large, growing):
        for index in range(request.sampling.n):
            assert collector.tokens[request.key, index] == engine_kit.undisturbed(request, index, 48)[0]
