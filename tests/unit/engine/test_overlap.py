"""Steps launched before the one before them is processed: what is computed in vain, and what goes wrong meanwhile."""

from collections.abc import Callable
from typing import Any

import pytest

import engine_kit
from engine_kit import EOS, VOCAB, Overlap
from scalellm.services.executor.engine import (
    AbortReason,
    Engine,
    EngineConfig,
    FakeModelRunner,
    FinishReason,
    RequestStatus,
    SampledBatch,
    ScheduledBatch,
    StepTimeModel,
)

OVERLAPPED = (Overlap.AT_WAIT, Overlap.AT_NEXT_LAUNCH)


class Probe:
    """A runner around FakePagedRunner that notes the order of calls, and raises or spoils a step when told to.

    Steps are numbered from 1 as they are launched.
    """

    overlaps = True

    def __init__(self, config: EngineConfig) -> None:
        self.inner = engine_kit.FakePagedRunner(config, Overlap.AT_WAIT)
        self.events: list[tuple[str, int]] = []
        self.num_sampled = 0
        self.fail_launch: set[int] = set()
        self.fail_wait: set[int] = set()
        self.failed_rows: dict[int, set[int]] = {}
        self._num_launches = 0

    def swap(self, outs: list[tuple[int, int]], ins: list[tuple[int, int]]) -> None:
        self.inner.swap(outs, ins)

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        self.inner.copy_blocks(pairs)

    def check_device(self) -> None:
        self.inner.check_device()

    def launch(self, batch: ScheduledBatch) -> "ProbedStep":
        self._num_launches += 1
        number = self._num_launches
        self.events.append(("launch", number))
        if number in self.fail_launch:
            raise OSError(f"launch {number}")
        self.num_sampled += sum(s.samples for s in batch.sequences)
        return ProbedStep(self, number, self.inner.launch(batch))


class ProbedStep:
    def __init__(self, probe: Probe, number: int, inner: engine_kit.FakeStep) -> None:
        self._probe, self._number, self._inner = probe, number, inner

    def draw(self) -> None:
        """Do nothing: no sample has a grammar."""

    def wait(self) -> SampledBatch:
        self._probe.events.append(("wait", self._number))
        sampled = self._inner.wait()
        if self._number in self._probe.fail_wait:
            raise MemoryError(f"wait {self._number}")
        sampled.failed = self._probe.failed_rows.get(self._number, set())
        return sampled


def start(**changes: object) -> tuple[Engine, Probe]:
    config = engine_kit.make_config(**changes)
    probe = Probe(config)
    return Engine(config, probe, engine_kit.SimClock()), probe


def check_empty(engine: Engine) -> None:
    load = engine.load()
    assert not engine.has_unfinished()
    assert (load.free_blocks, load.running, load.running_sequences) == (load.total_blocks, 0, 0)


def test_the_next_step_is_launched_before_the_last_one_is_waited_for() -> None:
    engine, probe = start()
    engine.add(engine_kit.make_request(0, [1, 2, 3], max_tokens=3, ignore_eos=True))
    sizes = []
    while engine.has_unfinished():
        sizes.append(len(engine.step().tokens))
    assert probe.events == [("launch", 1), ("launch", 2), ("wait", 1), ("launch", 3), ("wait", 2), ("wait", 3)]
    assert sizes == [0, 1, 1, 1]


def test_a_sequence_whose_tokens_must_be_known_is_never_launched_ahead() -> None:
    engine, probe = start(max_num_batched_tokens=8)
    engine.add(engine_kit.make_request(0, [1] * 12, max_tokens=2, ignore_eos=True, presence_penalty=1.0))
    collector = engine_kit.run(engine)
    # A chunk of the prompt samples nothing, so that nothing needs to be known after it.
    assert probe.events == [("launch", 1), ("launch", 2), ("wait", 1), ("wait", 2), ("launch", 3), ("wait", 3)]
    assert len(collector.tokens[(0, 0), 0]) == 2


@pytest.mark.parametrize("params", [{"max_tokens": 9}, {"prompt": 55}, {"max_tokens": 1}, {"n": 3, "max_tokens": 4}])
def test_an_end_by_length_costs_not_a_token_more(params: dict[str, Any]) -> None:
    totals = set()
    for overlap in Overlap:
        config = engine_kit.make_config()
        engine = Engine(config, engine_kit.FakePagedRunner(config, overlap), engine_kit.SimClock())
        prompt = [1] * params.get("prompt", 5)
        changes = {name: value for name, value in params.items() if name != "prompt"}
        request = engine_kit.make_request(0, prompt, ignore_eos=True, **changes)
        engine.add(request)
        collector = engine_kit.run(engine)
        for index in range(request.sampling.n):
            expected = engine_kit.undisturbed(request, index, 64)[0]
            assert collector.tokens[request.key, index] == expected
        stats = engine.stats()
        # With n > 1 the others start a step later, when the leader's step has told that the prompt is computed.
        totals.add(
            (stats.computed_tokens, stats.generated_tokens, stats.steps - (overlap in OVERLAPPED and "n" in params))
        )
    assert len(totals) == 1


def test_a_stop_costs_one_token_which_nobody_hears_of() -> None:
    engine, probe = start()
    request = next(
        request
        for seed in range(1000)
        for request in [engine_kit.make_request(0, [1, 2, 3], seed=seed)]
        if engine_kit.undisturbed(request, 0, 64)[1] == "stop"
    )
    expected, _ = engine_kit.undisturbed(request, 0, 64)
    engine.add(request)
    collector = engine_kit.run(engine)
    assert collector.tokens[request.key, 0] == expected
    assert collector.finished[request.key].usage.completion_tokens == len(expected)
    assert probe.num_sampled == len(expected) + 1
    assert engine.stats().generated_tokens == len(expected)
    check_empty(engine)


@pytest.mark.parametrize("overlap", OVERLAPPED)
def test_a_pending_token_is_drawn_again_after_preemption(overlap: Overlap) -> None:
    config = engine_kit.make_config(num_blocks=16, max_num_seqs=6)
    sampled = 0

    def count(batch: ScheduledBatch) -> None:
        nonlocal sampled
        sampled += sum(s.samples for s in batch.sequences)

    engine = Engine(config, engine_kit.FakePagedRunner(config, overlap, on_launch=count), engine_kit.SimClock())
    requests = [engine_kit.make_request(i, [i] * 6, ignore_eos=True, max_tokens=20, seed=i) for i in range(6)]
    for request in requests:
        engine.add(request)
    collector = engine_kit.run(engine)
    for request in requests:
        assert collector.tokens[request.key, 0] == engine_kit.undisturbed(request, 0, 64)[0]
    assert engine.stats().generated_tokens == 6 * 20
    assert sampled > 6 * 20  # some tokens were lost while they were pending: nothing here ends by a stop
    check_empty(engine)


def test_nobody_is_preempted_for_blocks_that_come_back_anyway() -> None:
    engine, _ = start(num_blocks=16, max_model_len=64)
    # 32 tokens each fill the cache; the first wants its ninth block when the second awaits its last token.
    engine.add(engine_kit.make_request(0, [1] * 30, max_tokens=9, ignore_eos=True))
    engine.add(engine_kit.make_request(1, [2] * 30, max_tokens=2, ignore_eos=True))
    engine_kit.run(engine)
    assert engine.stats().preemptions == 0


@pytest.mark.parametrize(
    ("changes", "error", "steps_ok"),
    [
        ({"fail_wait": {3}}, "MemoryError", 2),
        ({"fail_launch": {3}}, "OSError", 2),
        ({"fail_wait": {3, 4}}, "MemoryError", 2),
        ({"fail_launch": {4}, "fail_wait": {3}}, "MemoryError", 2),
    ],
)
def test_a_failed_step_ends_its_one_request_and_what_was_launched_on_top_of_it_is_done_again(
    changes: dict[str, set[int]], error: str, steps_ok: int
) -> None:
    engine, probe = start()
    for name, value in changes.items():
        setattr(probe, name, value)
    engine.add(engine_kit.make_request(0, [1] * 5, n=2, max_tokens=20, ignore_eos=True))
    collector = engine_kit.Collector()
    errors = []
    for step in range(30):
        if step == 3:  # its first chunk rides on the step that fails, or comes after both
            engine.add(engine_kit.make_request(1, [2] * 5, max_tokens=3, ignore_eos=True))
        result = engine.step()
        collector.take(result)
        engine.check_integrity()
        if result.error is not None:
            errors.append(type(result.error).__name__)
    assert errors[0] == error
    assert collector.finished[0, 0].status is RequestStatus.INTERNAL
    assert collector.finished[0, 0].message == f"the model runner failed ({error})"
    assert len(collector.tokens[(0, 0), 0]) == steps_ok
    assert collector.finished[0, 1].status is RequestStatus.OK
    other = engine_kit.make_request(1, [2] * 5, max_tokens=3, ignore_eos=True)
    assert collector.tokens[other.key, 0] == engine_kit.undisturbed(other, 0, 64)[0]
    assert len(collector.finished) == 2
    assert engine.stats().failed_steps == 1  # of the one on top of it nobody wants to know
    check_empty(engine)
    again = engine_kit.make_request(2, [1] * 5, max_tokens=4, ignore_eos=True)
    engine.add(again)
    engine_kit.run(engine, collector)
    assert collector.tokens[again.key, 0] == engine_kit.undisturbed(again, 0, 64)[0]


def test_a_row_that_failed_has_spoiled_nothing_but_its_own_request() -> None:
    engine, probe = start(max_num_batched_tokens=8)
    probe.failed_rows = {2: {0}}
    requests = [
        engine_kit.make_request(i, [1] * 24, max_tokens=8, ignore_eos=True, seed=i, priority=-i) for i in range(2)
    ]
    engine.add(requests[0])
    collector = engine_kit.Collector()
    for _ in range(2):
        collector.take(engine.step())
    engine.add(requests[1])  # the first chunk of its prompt is known, the second one fails in flight
    engine_kit.run(engine, collector)
    assert collector.finished[0, 1].usage.cached_tokens == 8
    assert collector.finished[0, 0].status is RequestStatus.INTERNAL
    assert collector.finished[0, 0].message == "the model computed values that are not finite"
    assert not collector.tokens[(0, 0), 0]
    assert collector.tokens[(0, 1), 0] == engine_kit.undisturbed(requests[1], 0, 64)[0]
    check_empty(engine)


@pytest.mark.parametrize("end", ["abort", "sample", "link", "deadline"])
def test_what_is_in_flight_when_a_request_is_ended_from_outside_is_dropped(end: str) -> None:
    config = engine_kit.make_config()
    clock = engine_kit.SimClock()
    runner = engine_kit.FakePagedRunner(config, Overlap.AT_WAIT)
    engine = Engine(config, runner, clock)
    engine.add(engine_kit.make_request(0, [1] * 5, max_tokens=9, ignore_eos=True, deadline=clock.now + 1))
    collector = engine_kit.Collector()
    for _ in range(3):
        collector.take(engine.step())
    before: Callable[[], None] = {
        "abort": lambda: engine.abort((0, 0)),
        "sample": lambda: engine.abort((0, 0), 0, AbortReason.STOP),
        "link": lambda: engine.drop_link(0),
        "deadline": lambda: clock.advance(2.0),
    }[end]
    before()
    engine.check_integrity()
    # The blocks are free at once, whoever gets them writes after the step in flight.
    other = engine_kit.make_request(1, [2] * 50, link=1, max_tokens=5, ignore_eos=True)
    engine.add(other)
    engine_kit.run(engine, collector)
    assert len(collector.tokens[(0, 0), 0]) == 2
    assert collector.samples[(0, 0), 0].reason is not FinishReason.LENGTH
    assert collector.tokens[other.key, 0] == engine_kit.undisturbed(other, 0, 64)[0]
    assert not runner.unwaited
    check_empty(engine)


@pytest.mark.parametrize(("overlaps", "expected"), [(False, 20 * 7.0), (True, 20 * 5.0 + 2.0)])
def test_the_fake_runner_hides_the_time_of_the_host(overlaps: bool, expected: float) -> None:
    """A step takes 5 s on the device, and the host 2 s; overlapped, the host is seen at the end only."""
    clock = engine_kit.SimClock()
    config = engine_kit.make_config()
    runner = FakeModelRunner(
        VOCAB, [EOS], StepTimeModel(5.0, 0.0, 0.0, 0.0), sleep=clock.advance, clock=clock, overlaps=overlaps
    )
    engine = Engine(config, runner, clock)
    engine.add(engine_kit.make_request(0, [1, 2], max_tokens=20))
    started = clock.now
    tokens = []
    while engine.has_unfinished():
        tokens += [token for output in engine.step().tokens for token in output.token_ids]
        clock.advance(2.0)
    assert clock.now - started == expected
    everything = [1, 2]
    while len(everything) < 22:
        everything.append(runner.next_token(everything[-1], len(everything)))
    assert tokens == everything[2:]
