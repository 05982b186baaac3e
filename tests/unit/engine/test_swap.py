"""Preemption by swapping: when it is chosen, what it saves, and what becomes of the host's blocks."""

import pytest

import engine_kit
from engine_kit import Overlap
from scalellm.services.executor.engine import (
    Engine,
    EngineConfigError,
    EngineRequest,
    RequestStatus,
    ScheduledBatch,
    SwapCost,
)
from scalellm.services.executor.engine.block_manager import BlockManager
from scalellm.services.executor.engine.host_block_pool import HostBlockPool
from scalellm.services.executor.engine.prefill_budget import PrefillBudget
from scalellm.services.executor.engine.sequence import Sequence, SequenceGroup
from scalellm.services.executor.engine.swap import Swapper

FREE = SwapCost(bytes_per_block=1, bytes_per_second=1e12)


def make_sequence(tokens: list[int]) -> Sequence:
    request = engine_kit.make_request(0, tokens)
    group = SequenceGroup(request, arrival=0, now=0.0, seed=0, eos_token_ids=frozenset(), max_model_len=1000)
    return group.samples[0]


def admit(blocks: BlockManager, seq: Sequence, num_computed: int) -> Sequence:
    assert blocks.admit(seq, max_cached_tokens=1000, spare=0)
    seq.num_computed_tokens = max(seq.num_computed_tokens, num_computed)
    blocks.publish(seq, seq.num_computed_tokens)
    return seq


@pytest.fixture
def blocks() -> BlockManager:
    return BlockManager(16, 4, enable_prefix_cache=True)


def make_swapper(blocks: BlockManager, cost: SwapCost = FREE) -> Swapper:
    prefill = PrefillBudget(None, 1)
    prefill.observe(num_decodes=0, num_prefill_tokens=100, seconds=1.0)
    return Swapper(8, cost, blocks, prefill)


def test_what_is_found_is_not_copied_back(blocks: BlockManager) -> None:
    swapper = make_swapper(blocks)
    early = make_sequence(list(range(20)))
    assert blocks.admit(early, max_cached_tokens=1000, spare=0)
    early.num_computed_tokens = 6  # in the middle of its prompt
    swapper.save(early)
    assert early.host_copy is not None
    assert (early.host_copy.first_block, len(early.host_copy.blocks), early.host_copy.num_tokens) == (0, 2, 6)
    assert early.num_lost_tokens == 14
    blocks.free(early)
    admit(blocks, make_sequence(list(range(20))), 20)
    admit(blocks, early, 0)
    swapper.restore(early)
    assert early.num_computed_tokens == 16
    outs, ins, saved = swapper.take_transfers()
    assert (len(outs), ins, saved) == (2, [], [early])


def test_a_host_block_that_a_step_reads_is_written_by_none_before_the_next(blocks: BlockManager) -> None:
    swapper = make_swapper(blocks)
    seq = admit(blocks, make_sequence(list(range(18))), 18)
    swapper.save(seq)
    out, _, _ = swapper.take_transfers()
    blocks.free(seq)
    blocks.free(admit(blocks, make_sequence([9] * 64), 0))  # nothing can be found any more
    admit(blocks, seq, 0)
    swapper.restore(seq)
    assert seq.num_computed_tokens == 17
    assert swapper.num_free == 8 - 5
    _, back, _ = swapper.take_transfers()
    assert back == list(zip(seq.block_table, [block for _, block in out], strict=True))
    assert swapper.num_free == 8


def test_shared_blocks_stay_only_if_they_can_be_found(blocks: BlockManager) -> None:
    parent = admit(blocks, make_sequence(list(range(10))), 10)
    assert blocks.num_shared_blocks(parent) == 0
    child = make_sequence(list(range(10)))
    blocks.fork(parent, child, 9)
    assert len(child.block_table) == 3
    assert blocks.num_shared_blocks(child) == 2  # the third is shared too, but not full


@pytest.mark.parametrize(("num_shared", "swaps"), [(8, False), (0, True)])
def test_what_stays_counts_neither_way(blocks: BlockManager, num_shared: int, swaps: bool) -> None:
    """Two tokens of a third block are worth 0.02 s; all ten, 0.1 s. A block takes 0.03 s."""
    swapper = make_swapper(blocks, SwapCost(bytes_per_block=15, bytes_per_second=1000))
    tokens = list(range(11))
    other = admit(blocks, make_sequence([*tokens[:num_shared], 9]), num_shared + 1)
    seq = admit(blocks, make_sequence(tokens), 11)
    swapper.save(seq)
    assert (seq.host_copy is not None) == swaps
    assert blocks.num_shared_blocks(other) == num_shared // 4


class World:
    """An engine with too few blocks for three requests, on a clock that each token of prefill moves by 0.01 s."""

    def __init__(self, overlap: Overlap = Overlap.NONE, cost: SwapCost = FREE, **changes: object) -> None:
        settings = {"num_blocks": 16, "max_model_len": 48, "max_num_seqs": 4, "num_host_blocks": 40} | changes
        self.config = engine_kit.make_config(**settings)
        self.clock = engine_kit.SimClock()
        self.batches: list[ScheduledBatch] = []
        self.runner = engine_kit.FakePagedRunner(
            self.config, overlap, on_launch=self.batches.append, on_execute=self.on_execute
        )
        self.engine = Engine(self.config, self.runner, self.clock, cost)
        self.collector = engine_kit.Collector()

    def on_execute(self, batch: ScheduledBatch) -> None:
        self.clock.advance(0.001 + 0.01 * batch.num_prefill_tokens)

    def add(self, count: int = 3, prompt: list[int] | None = None) -> list[EngineRequest]:
        requests = [
            engine_kit.make_request(i, prompt or [i] * 10, max_tokens=30, ignore_eos=True, seed=i) for i in range(count)
        ]
        for request in requests:
            self.engine.add(request)
        return requests

    def step_until_swapped(self) -> None:
        while not self.engine.stats().swaps:
            self.collector.take(self.engine.step())
        assert self.engine.load().free_host_blocks < self.engine.load().total_host_blocks

    def finish(self, requests: list[EngineRequest]) -> None:
        engine_kit.run(self.engine, self.collector)
        for request in requests:
            expected, _ = engine_kit.undisturbed(request, 0, self.config.max_model_len)
            assert self.collector.tokens[request.key, 0] == expected
        self.check_empty()

    def check_empty(self) -> None:
        load = self.engine.load()
        assert (load.free_blocks, load.free_host_blocks) == (load.total_blocks, load.total_host_blocks)
        assert load.waiting_prefill_tokens == 0


@pytest.mark.parametrize("overlap", Overlap)
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_what_was_swapped_is_not_computed_again(overlap: Overlap, prefix_cache: bool) -> None:
    world = World(overlap, enable_prefix_cache=prefix_cache)
    world.finish(world.add())
    stats = world.engine.stats()
    assert stats.preemptions == stats.swaps > 0
    assert stats.swapped_out_blocks >= stats.swapped_in_blocks > 0
    if not prefix_cache:
        assert stats.swapped_out_blocks == stats.swapped_in_blocks
    # A preempted sequence loses a pending token at most, and else goes on with the very token that it would have had.
    lost = stats.swaps if world.runner.overlaps else 0
    assert stats.computed_tokens <= 3 * 39 + lost
    if not world.runner.overlaps:
        assert stats.computed_tokens == 3 * 39


@pytest.mark.parametrize(
    ("cost", "swaps"),
    [
        # At stake are 10 to 39 tokens of 0.01 s each, in blocks of 4.
        (SwapCost(bytes_per_block=100, bytes_per_second=1e6), True),
        (SwapCost(bytes_per_block=100, bytes_per_second=1e3), False),
        (SwapCost(bytes_per_block=100, bytes_per_second=1e6, seconds_per_transfer=0.2), False),
    ],
)
def test_the_cheaper_way_is_taken(cost: SwapCost, swaps: bool) -> None:
    world = World(cost=cost)
    world.finish(world.add())
    stats = world.engine.stats()
    assert stats.preemptions > 0
    assert (stats.swaps > 0) == swaps


def test_the_time_of_transfers_is_not_put_down_to_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(num_host_blocks=9)
    inner = world.runner.swap

    def swap(outs: list[tuple[int, int]], ins: list[tuple[int, int]]) -> None:
        world.clock.advance(50.0)
        inner(outs, ins)

    monkeypatch.setattr(world.runner, "swap", swap)
    world.finish(world.add())
    assert world.engine.stats().swaps > 0
    assert world.engine._prefill_budget.seconds_per_token == pytest.approx(0.01, rel=0.2)


def test_without_room_on_the_host_all_is_computed_again() -> None:
    world = World(num_host_blocks=2)
    world.finish(world.add())
    assert world.engine.stats().preemptions > 0
    assert world.engine.stats().swaps == 0


@pytest.mark.parametrize("overlap", Overlap)
def test_ending_a_swapped_request_frees_its_host_blocks(overlap: Overlap) -> None:
    world = World(overlap)
    requests = world.add()
    world.step_until_swapped()
    assert world.engine.load().waiting_prefill_tokens == 1
    world.engine.abort((0, 2))
    assert world.engine.load().free_host_blocks == 40
    world.engine.check_integrity()
    world.finish(requests[:2])
    assert world.collector.finished[0, 2].status is RequestStatus.CANCELLED


@pytest.mark.parametrize("fails", ["swap", "launch"])
def test_what_a_failed_step_was_to_swap_out_is_computed_again(fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(Overlap.AT_WAIT)
    requests = world.add()
    num_failed = 0

    swap, launch = world.runner.swap, world.runner.launch

    def fail_once(is_due: bool) -> None:
        nonlocal num_failed
        if is_due and not num_failed:
            num_failed = 1
            raise OSError(fails)

    def fail_to_swap(*pairs: list[tuple[int, int]]) -> None:
        fail_once(fails == "swap")
        swap(*pairs)

    def fail_to_launch(batch: ScheduledBatch) -> engine_kit.FakeStep:
        fail_once(fails == "launch" and batch.has_swaps)
        return launch(batch)

    monkeypatch.setattr(world.runner, "swap", fail_to_swap)
    monkeypatch.setattr(world.runner, "launch", fail_to_launch)
    world.finish(requests)
    assert world.engine.stats().failed_steps == num_failed == 1
    world.check_empty()


def test_a_beginning_that_others_hold_is_left_to_the_prefix_cache() -> None:
    world = World()
    world.engine.add(engine_kit.make_request(9, [5] * 12, max_tokens=1))
    engine_kit.run(world.engine, world.collector)  # the prompt's first three blocks can be found
    requests = world.add(count=3, prompt=[5] * 12 + [6])
    world.step_until_swapped()
    victim = next(batch for batch in world.batches if batch.swap_outs)
    (swapped,) = victim.swapped_out
    assert swapped.host_copy is not None
    assert swapped.host_copy.first_block == 3
    assert len(victim.swap_outs) == len(swapped.host_copy.blocks)
    world.finish(requests)


@pytest.mark.parametrize("overlap", Overlap)
def test_a_beginning_that_is_gone_is_computed_again(overlap: Overlap) -> None:
    world = World(overlap, num_blocks=14)
    prompt = [5] * 12
    world.engine.add(engine_kit.make_request(9, prompt, max_tokens=1))
    engine_kit.run(world.engine, world.collector)
    long = engine_kit.make_request(0, [*prompt, 6], max_tokens=35, ignore_eos=True, seed=1)
    short = engine_kit.make_request(1, [*prompt, 7], max_tokens=35, ignore_eos=True, seed=2)
    for request in (long, short):
        world.engine.add(request)
    world.step_until_swapped()
    (swapped,) = world.batches[-1].swapped_out
    assert swapped.host_copy is not None
    assert swapped.host_copy.first_block == 3
    world.engine.abort(long.key)
    # Takes every block, those of the shared beginning too, before the swapped one comes back.
    other = engine_kit.make_request(2, [9] * 47, max_tokens=1, priority=-1)
    world.engine.add(other)
    world.finish([short, other])
    stats = world.engine.stats()
    assert stats.swaps > 0
    assert stats.swapped_in_blocks == 0


def test_a_cost_and_host_blocks_belong_together() -> None:
    config = engine_kit.make_config(num_host_blocks=3)
    with pytest.raises(EngineConfigError, match=r"num_host_blocks \(3\) need a swap_cost"):
        Engine(config, engine_kit.FakePagedRunner(config))
    with pytest.raises(EngineConfigError, match="num_host_blocks must be at least 0, got -1"):
        engine_kit.make_config(num_host_blocks=-1)


def test_the_host_pool_keeps_its_books() -> None:
    pool = HostBlockPool(3)
    blocks = pool.take(2)
    pool.check_integrity(blocks)
    with pytest.raises(AssertionError, match="host blocks"):
        pool.check_integrity([])
    with pytest.raises(RuntimeError, match="2 host blocks wanted, 1 are free"):
        pool.take(2)
    pool.release(blocks)
    assert sorted(pool.take(3)) == [0, 1, 2]
