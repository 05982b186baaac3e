"""The content of a step: order, budgets, priorities, preemption, and the bounded work of a step."""

from collections.abc import Callable

import pytest

import engine_kit
from engine_kit import Overlap
from scalellm.services.executor.engine import CapacityPolicy, Engine, EngineConfig, InvalidRequestError, ScheduledBatch
from scalellm.services.executor.engine.prefill_budget import PrefillBudget


class Recorder:
    """Remembers who was scheduled: per step, (handle, sample, number of tokens)."""

    def __init__(self, config: EngineConfig, overlap: Overlap, seconds: float = 0.0) -> None:
        self.steps: list[list[tuple[int, int, int]]] = []
        self.clock = engine_kit.SimClock()
        self.runner = engine_kit.FakePagedRunner(config, overlap, on_launch=self.on_launch, on_execute=self.on_execute)
        self.overlaps = self.runner.overlaps
        self.seconds_per_token = seconds

    def on_launch(self, batch: ScheduledBatch) -> None:
        self.steps.append([(s.seq.group.key[1], s.seq.index, s.num_tokens) for s in batch.sequences])

    def on_execute(self, batch: ScheduledBatch) -> None:
        self.clock.advance(1.0 + self.seconds_per_token * batch.num_prefill_tokens)


Start = Callable[..., tuple[Engine, Recorder]]


@pytest.fixture(params=(Overlap.NONE, Overlap.AT_WAIT), ids=str)
def overlap(request: pytest.FixtureRequest) -> Overlap:
    return request.param


@pytest.fixture
def start(overlap: Overlap) -> Start:
    def start(**changes: object) -> tuple[Engine, Recorder]:
        config = engine_kit.make_config(**changes)
        recorder = Recorder(config, overlap)
        return Engine(config, recorder.runner, recorder.clock), recorder

    return start


def test_prompts_are_computed_in_chunks_beside_decodes_which_come_first(start: Start) -> None:
    engine, recorder = start(max_num_batched_tokens=16)
    engine.add(engine_kit.make_request(0, [1] * 5, max_tokens=10, ignore_eos=True))
    engine.step()
    engine.add(engine_kit.make_request(1, [2] * 40, max_tokens=2, ignore_eos=True))
    for _ in range(4):
        engine.step()
    assert recorder.steps[1:] == [
        [(0, 0, 1), (1, 0, 15)],
        [(0, 0, 1), (1, 0, 15)],
        [(0, 0, 1), (1, 0, 10)],
        [(0, 0, 1), (1, 0, 1)],
    ]


def test_priority_goes_before_arrival_and_overtakes_a_running_prefill(start: Start) -> None:
    engine, recorder = start(max_num_batched_tokens=8)
    engine.add(engine_kit.make_request(0, [1] * 30, max_tokens=1))
    engine.add(engine_kit.make_request(1, [2] * 4, max_tokens=1))
    engine.step()
    engine.add(engine_kit.make_request(2, [3] * 12, max_tokens=1, priority=-1))
    for _ in range(3):
        engine.step()
    assert recorder.steps == [[(0, 0, 8)], [(2, 0, 8)], [(2, 0, 4), (0, 0, 4)], [(0, 0, 8)]]


def test_the_last_sequence_is_preempted_and_comes_back_first(start: Start) -> None:
    engine, _ = start(num_blocks=8, max_model_len=32, max_num_seqs=4)
    for handle, priority in ((0, 0), (1, 5), (2, 0)):
        engine.add(
            engine_kit.make_request(
                handle, [handle] * 7, max_tokens=24, ignore_eos=True, priority=priority, seed=handle
            )
        )
    collector = engine_kit.run(engine)
    preemptions = {key[1]: finish.usage.num_preemptions for key, finish in collector.finished.items()}
    assert preemptions[0] == 0
    assert preemptions[1] > 0  # the lowest priority, though not the latest, gives way first
    order = list(collector.finished)
    assert order == [(0, 0), (0, 2), (0, 1)]
    assert collector.finished[0, 1].timings.preempted > 0
    assert collector.finished[0, 0].timings.preempted == 0


def test_guaranteed_no_evict_admits_only_what_can_finish(start: Start) -> None:
    engine, recorder = start(
        num_blocks=8, max_model_len=32, max_num_seqs=4, capacity_policy=CapacityPolicy.GUARANTEED_NO_EVICT
    )
    for handle in range(3):
        engine.add(engine_kit.make_request(handle, [handle] * 4, max_tokens=12, ignore_eos=True))
    engine.step()
    assert [handle for handle, _, _ in recorder.steps[0]] == [0, 1]  # 4 blocks each at their longest
    engine_kit.run(engine)
    assert engine.stats().preemptions == 0


def test_guaranteed_no_evict_refuses_what_could_never_start(start: Start) -> None:
    engine, _ = start(num_blocks=8, max_model_len=32, capacity_policy=CapacityPolicy.GUARANTEED_NO_EVICT)
    with pytest.raises(InvalidRequestError, match=r"n: 3 samples .* need 22 cache blocks .* has 8"):
        engine.add(engine_kit.make_request(0, [1] * 6, n=3))
    assert engine.stats().rejected == 1
    assert not engine.has_unfinished()


def test_samples_share_the_prompt_and_split_from_its_last_block(start: Start) -> None:
    engine, recorder = start(num_blocks=32)
    engine.add(engine_kit.make_request(0, [1] * 10, n=3, max_tokens=4, ignore_eos=True))
    engine.step()
    used_after_prompt = 32 - engine.load().free_blocks
    engine.step()
    ahead: list[list[tuple[int, int, int]]] = []
    if recorder.overlaps:  # the leader goes on before the others hear that the prompt is computed
        engine.step()
        ahead = [[(0, 0, 1)]]
    assert recorder.steps == [[(0, 0, 10)], *ahead, [(0, 0, 1), (0, 1, 1), (0, 2, 1)]]
    assert used_after_prompt == 3
    assert 32 - engine.load().free_blocks == 3 + 2  # one sample keeps the partial block, two copied it


def test_samples_need_rows_for_all_before_they_start(start: Start) -> None:
    engine, recorder = start(max_num_seqs=3)
    engine.add(engine_kit.make_request(0, [1] * 3, max_tokens=3, ignore_eos=True))
    engine.add(engine_kit.make_request(1, [2] * 3, n=3, max_tokens=3, ignore_eos=True))
    engine.add(engine_kit.make_request(2, [3] * 3, max_tokens=3, ignore_eos=True))
    engine_kit.run(engine)
    started = {
        handle: next(i for i, step in enumerate(recorder.steps) if (handle, 0, 3) in step) for handle in range(3)
    }
    assert started[0] < started[1] < started[2]


def test_work_per_step_does_not_grow_with_what_is_cached(start: Start) -> None:
    engine, recorder = start(num_blocks=200, max_model_len=128, max_num_batched_tokens=64)
    tokens = 0
    for handle in range(4):
        engine.add(engine_kit.make_request(handle, [handle] * 50, max_tokens=60, ignore_eos=True))
        tokens += 110
    engine_kit.run(engine)
    blocks_used = 4 * -(-109 // 4)  # the last token is never computed
    assert recorder.runner.table_writes == blocks_used
    assert engine.num_hashed_blocks <= tokens // 4


def test_target_itl_limits_chunks_only_beside_decodes(overlap: Overlap) -> None:
    config = engine_kit.make_config(
        max_num_batched_tokens=32, max_model_len=64, target_itl=2.0, min_prefill_chunk=4, num_blocks=128
    )
    recorder = Recorder(config, overlap, seconds=0.1)
    engine = Engine(config, recorder.runner, recorder.clock)
    engine.add(engine_kit.make_request(0, [1] * 30, max_tokens=20, ignore_eos=True))
    for _ in range(3):
        engine.step()
    engine.add(engine_kit.make_request(1, [2] * 50, max_tokens=1))
    for _ in range(7):
        engine.step()
    assert recorder.steps[0] == [(0, 0, 30)]  # nobody waits: no limit
    chunks = [size for step in recorder.steps[3:] for handle, _, size in step if handle == 1]
    # 1 s of 2 s is left beside the decode; a token costs 0.13 s by the first step, 0.1 s by those that follow.
    assert chunks[0] == 7
    assert all(4 <= chunk <= 10 for chunk in chunks[:-1])
    assert sum(chunks) == 50


@pytest.mark.parametrize(("decode_step", "expected"), [(0.5, 50), (0.99, 8), (3.0, 8)])
def test_prefill_budget_leaves_a_minimum(decode_step: float, expected: int) -> None:
    budget = PrefillBudget(target_itl=1.0, min_chunk=8)
    assert budget.limit(3, 100) == 8  # nothing measured yet
    budget.observe(num_decodes=3, num_prefill_tokens=0, seconds=decode_step)
    budget.observe(num_decodes=0, num_prefill_tokens=100, seconds=1.0)
    assert budget.limit(3, 100) == expected
    assert budget.limit(0, 100) == 100
    assert budget.limit(3, 5) == min(5, expected)
    assert PrefillBudget(None, 8).limit(3, 100) == 100


def test_prefill_budget_forgets_a_slow_step_even_if_every_step_has_prefill() -> None:
    budget = PrefillBudget(target_itl=1.0, min_chunk=8)
    budget.observe(num_decodes=0, num_prefill_tokens=100, seconds=0.5)
    budget.observe(num_decodes=3, num_prefill_tokens=0, seconds=5.0)
    assert budget.limit(3, 200) == 8
    budget.observe(num_decodes=3, num_prefill_tokens=8, seconds=0.2)
    assert budget.limit(3, 200) > 150


def test_prefill_budget_learns_little_from_a_single_token() -> None:
    budget = PrefillBudget(None, min_chunk=8)
    assert budget.seconds_per_token is None
    budget.observe(num_decodes=0, num_prefill_tokens=100, seconds=1.0)
    budget.observe(num_decodes=3, num_prefill_tokens=1, seconds=0.41)
    assert budget.seconds_per_token == pytest.approx(0.01 + 0.2 / 8 * 0.4)
    budget.observe(num_decodes=3, num_prefill_tokens=8, seconds=0.16)
    assert budget.seconds_per_token == pytest.approx(0.02)
