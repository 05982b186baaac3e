"""A runner that fails with one request: that one ends, and all others go on with the texts they would have had."""

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import engine_kit
from scalellm.services.executor.engine import (
    CapacityPolicy,
    DeviceLostError,
    Engine,
    EngineRequest,
    RequestStatus,
    ScheduledBatch,
    SwapCost,
)

POISON = 3
"""Handle of the request with which steps fail."""


def make_engine(
    overlap: engine_kit.Overlap, fails: Callable[[ScheduledBatch], bool], at_launch: bool = False, **changes: object
) -> Engine:
    config = engine_kit.make_config(**({"max_model_len": 48} | changes))
    clock = engine_kit.SimClock()

    def check(batch: ScheduledBatch) -> None:
        clock.advance(1.0)
        if fails(batch):
            raise ValueError("poison")

    hooks = {"on_launch" if at_launch else "on_execute": check}
    runner = engine_kit.FakePagedRunner(config, overlap, **hooks)
    return Engine(config, runner, clock, SwapCost(1, 1e9))


def make_requests(count: int = 8, **changes: object) -> list[EngineRequest]:
    return [
        engine_kit.make_request(handle, [handle % 3] * (4 + handle), seed=handle, max_tokens=12, **changes)
        for handle in range(count)
    ]


def holds_poison(batch: ScheduledBatch, position: int = 0) -> bool:
    return any(s.seq.group.key[1] == POISON and s.position >= position for s in batch.sequences)


def check_text(collector: engine_kit.Collector, request: EngineRequest) -> None:
    for index in range(request.sampling.n):
        assert collector.tokens[request.key, index] == engine_kit.undisturbed(request, index, 48)[0]


def check_empty(engine: Engine) -> None:
    load = engine.load()
    assert (load.free_blocks, load.free_host_blocks) == (load.total_blocks, load.total_host_blocks)
    assert (load.running, load.waiting, load.running_sequences, load.waiting_sequences) == (0, 0, 0, 0)
    assert load.waiting_prefill_tokens == 0


@pytest.mark.parametrize("overlap", engine_kit.Overlap)
@pytest.mark.parametrize("at_launch", [False, True])
@pytest.mark.parametrize("position", [0, 11])
def test_the_request_with_which_steps_fail_ends_alone(
    overlap: engine_kit.Overlap, at_launch: bool, position: int
) -> None:
    engine = make_engine(overlap, lambda batch: holds_poison(batch, position), at_launch)
    requests = make_requests(ignore_eos=True)
    for request in requests:
        engine.add(request)
    collector = engine_kit.Collector()
    culprits = []
    while engine.has_unfinished():
        result = engine.step()
        culprits += result.culprits
        collector.take(result)
        engine.check_integrity()
    for request in requests:
        finish = collector.finished[request.key]
        if request.key[1] == POISON:
            assert finish.status is RequestStatus.INTERNAL
            assert finish.message.startswith("the model runner failed")
            emitted = collector.tokens[request.key, 0]
            assert emitted == engine_kit.undisturbed(request, 0, 48)[0][: len(emitted)]
        else:
            assert finish.status is RequestStatus.OK
            check_text(collector, request)
    assert [request.key[1] for request in culprits] == [POISON]
    assert engine.stats().failed_steps <= 4  # of eight, four, two, and alone
    check_empty(engine)


@pytest.mark.parametrize("overlap", engine_kit.Overlap)
def test_a_fault_that_does_not_come_again_costs_nobody_anything(overlap: engine_kit.Overlap) -> None:
    num_steps = 0

    def fails_once(batch: ScheduledBatch) -> bool:
        nonlocal num_steps
        num_steps += 1
        return num_steps == 4

    engine = make_engine(overlap, fails_once)
    requests = make_requests(4, n=2)
    for request in requests:
        engine.add(request)
    collector = engine_kit.run(engine)
    for request in requests:
        assert collector.finished[request.key].status is RequestStatus.OK
        check_text(collector, request)
    assert engine.stats().failed_steps == 1
    check_empty(engine)


@pytest.mark.parametrize("overlap", engine_kit.Overlap)
def test_a_lost_device_is_no_request_s_fault(overlap: engine_kit.Overlap) -> None:
    config, clock = engine_kit.make_config(max_model_len=48), engine_kit.SimClock()

    def fail_at_the_fourth(batch: ScheduledBatch) -> None:
        clock.advance(1.0)
        if len(runner.batches) >= 4:
            runner.lost = OSError("the GPU has left the bus")
            raise ValueError("a launch failed")

    runner = engine_kit.FakePagedRunner(config, overlap, on_launch=fail_at_the_fourth)
    engine = Engine(config, runner, clock, SwapCost(1, 1e9))
    for request in make_requests(ignore_eos=True):
        engine.add(request)
    collector = engine_kit.Collector()
    with pytest.raises(DeviceLostError, match="OSError: the GPU has left the bus") as raised:
        engine_kit.run(engine, collector)
    assert isinstance(raised.value.__cause__, ValueError)
    assert not collector.finished


@pytest.mark.parametrize("overlap", engine_kit.Overlap)
def test_a_runner_that_fails_with_every_request_ends_all_soon(overlap: engine_kit.Overlap) -> None:
    engine = make_engine(overlap, lambda batch: True)
    for request in make_requests():
        engine.add(request)
    collector = engine_kit.run(engine)
    assert {finish.status for finish in collector.finished.values()} == {RequestStatus.INTERNAL}
    assert engine.stats().failed_steps < 2 * 8
    check_empty(engine)


@pytest.mark.parametrize("overlap", engine_kit.Overlap)
@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    spare_blocks=st.sampled_from((0, 3, 40)),
    num_host_blocks=st.sampled_from((0, 30)),
    prefix_cache=st.booleans(),
    policy=st.sampled_from(CapacityPolicy),
)
def test_faults_of_one_request_at_random_steps_change_no_other_text(
    overlap: engine_kit.Overlap,
    seed: int,
    spare_blocks: int,
    num_host_blocks: int,
    prefix_cache: bool,
    policy: CapacityPolicy,
) -> None:
    rng = random.Random(seed)
    likely = rng.choice((0.1, 0.5, 1.0))
    engine = make_engine(
        overlap,
        lambda batch: holds_poison(batch) and rng.random() < likely,
        at_launch=rng.random() < 0.5,
        num_blocks=12 + spare_blocks,
        max_num_batched_tokens=rng.choice((8, 32)),
        num_host_blocks=num_host_blocks,
        enable_prefix_cache=prefix_cache,
        capacity_policy=policy,
    )
    requests = make_requests(7, n=rng.choice((1, 2)), prompt_logprobs=rng.choice((None, 0)))
    collector = engine_kit.Collector()
    for request in requests:
        for _ in range(rng.choice((0, 0, 2))):
            collector.take(engine.step())
        engine.add(request)
    engine_kit.run(engine, collector)
    for request in requests:
        finish = collector.finished[request.key]
        if finish.status is RequestStatus.OK:
            check_text(collector, request)
        else:
            assert request.key[1] == POISON
    check_empty(engine)


@pytest.mark.parametrize("overlap", engine_kit.Overlap)
def test_nobody_ends_for_one_that_ended_before_the_failure_of_its_step_was_known(overlap: engine_kit.Overlap) -> None:
    num_failed = 0
    for num_steps in range(8):
        engine = make_engine(overlap, lambda batch: holds_poison(batch, 10))
        other, poison = make_requests(4, ignore_eos=True)[2:]
        collector = engine_kit.Collector()
        engine.add(other)
        engine.add(poison)
        for _ in range(num_steps):
            collector.take(engine.step())
        engine.abort(poison.key)  # its step may be in flight
        engine_kit.run(engine, collector)
        assert collector.finished[other.key].status is RequestStatus.OK
        check_text(collector, other)
        num_failed += engine.stats().failed_steps
        check_empty(engine)
    assert num_failed > 0


def test_a_request_that_leaves_while_it_is_on_trial_is_missed_by_nobody() -> None:
    engine = make_engine(engine_kit.Overlap.NONE, lambda batch: holds_poison(batch, 11))
    requests = make_requests(6, ignore_eos=True)
    for request in requests:
        engine.add(request)
    collector = engine_kit.Collector()
    while not engine.stats().failed_steps:
        collector.take(engine.step())
    engine.abort((0, POISON))
    engine.abort((0, 0))
    engine_kit.run(engine, collector)
    for request in requests:
        aborted = request.key[1] in (0, POISON)
        assert collector.finished[request.key].status is (RequestStatus.CANCELLED if aborted else RequestStatus.OK)
        if not aborted:
            check_text(collector, request)
    check_empty(engine)
