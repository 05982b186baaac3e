"""BlockManager, PrefixCache, BlockPool: a stateful test that models every block's content, and the order of reuse."""

from itertools import pairwise

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import engine_kit
from scalellm.services.executor.engine.block_manager import BlockManager
from scalellm.services.executor.engine.block_pool import BlockPool
from scalellm.services.executor.engine.sequence import Sequence, SequenceGroup

SIZE = 3
NUM_BLOCKS = 14


def make_sequence(tokens: list[int], salt: bytes = b"") -> Sequence:
    request = engine_kit.make_request(0, tokens, cache_salt=salt)
    group = SequenceGroup(request, arrival=0, now=0.0, seed=0, eos_token_ids=frozenset(), max_model_len=10_000)
    return group.samples[0]


def compute(blocks: BlockManager, seq: Sequence) -> None:
    seq.num_computed_tokens = len(seq.token_ids)
    blocks.publish(seq, seq.num_computed_tokens)


class BlockManagerMachine(RuleBasedStateMachine):
    """Sequences come, grow, fork and go; each cell of the model cache holds the salt and tokens it was written for."""

    block_run = 1

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(NUM_BLOCKS, SIZE, enable_prefix_cache=True, block_run=self.block_run)
        self.cells: dict[tuple[int, int], tuple[bytes, tuple[int, ...]]] = {}
        self.sequences: list[Sequence] = []
        self.num_tokens = 0

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=12), salt=st.sampled_from((b"", b"x")))
    def admit(self, tokens: list[int], salt: bytes) -> None:
        seq = make_sequence(tokens, salt)
        self.num_tokens += len(tokens)
        free = self.blocks.num_free
        if not self.blocks.admit(seq, max_cached_tokens=len(tokens), spare=0):
            assert (self.blocks.num_free, seq.block_table) == (free, [])
            return
        assert seq.num_computed_tokens < len(tokens)
        self.sequences.append(seq)
        self.run(seq)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), tokens=st.lists(st.integers(0, 1), min_size=1, max_size=5))
    def grow(self, data: st.DataObject, tokens: list[int]) -> None:
        """One step in which some sequences grow: all get their blocks, the copies run, then all are written."""
        batch = data.draw(st.lists(st.sampled_from(self.sequences), unique=True, min_size=1))
        running = []
        for seq in batch:
            seq.token_ids.extend(tokens)
            self.num_tokens += len(tokens)
            free, table = self.blocks.num_free, list(seq.block_table)
            if self.blocks.extend(seq):
                running.append(seq)
            else:
                assert (self.blocks.num_free, seq.block_table) == (free, table)
                self.free(seq)  # preempted
            self.blocks.check_integrity(self.sequences)
        copies = self.blocks.take_copies()
        assert not {source for source, _ in copies} & {target for _, target in copies}
        for source, target in copies:
            for offset in range(SIZE):
                if (source, offset) in self.cells:
                    self.cells[target, offset] = self.cells[source, offset]
        for seq in running:
            self.run(seq)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        parent = data.draw(st.sampled_from(self.sequences))
        prompt = data.draw(st.integers(1, len(parent.token_ids)))
        child = make_sequence(parent.token_ids[:prompt], parent.group.request.cache_salt)
        self.blocks.fork(parent, child, prompt - 1)
        self.num_tokens += prompt
        self.sequences.append(child)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        self.free(data.draw(st.sampled_from(self.sequences)))

    @invariant()
    def books_are_right(self) -> None:
        self.blocks.check_integrity(self.sequences)
        for seq in self.sequences:
            for position in range(seq.num_computed_tokens):
                assert self.cell(seq, position) == self.expected(seq, position)

    def teardown(self) -> None:
        for seq in list(self.sequences):
            self.free(seq)
        assert self.blocks.num_free == NUM_BLOCKS
        assert self.blocks.num_hashed_blocks <= self.num_tokens // SIZE

    def run(self, seq: Sequence) -> None:
        for position in range(seq.num_computed_tokens, len(seq.token_ids)):
            self.cells[seq.block_table[position // SIZE], position % SIZE] = self.expected(seq, position)
        compute(self.blocks, seq)

    def free(self, seq: Sequence) -> None:
        self.sequences.remove(seq)
        self.blocks.free(seq)

    def cell(self, seq: Sequence, position: int) -> tuple[bytes, tuple[int, ...]]:
        return self.cells[seq.block_table[position // SIZE], position % SIZE]

    @staticmethod
    def expected(seq: Sequence, position: int) -> tuple[bytes, tuple[int, ...]]:
        return seq.group.request.cache_salt, tuple(seq.token_ids[: position + 1])


class RunsMachine(BlockManagerMachine):
    """The machine with runs of neighbouring blocks, of which the last one is shorter."""

    block_run = 4


BlockManagerMachine.TestCase.settings = settings(max_examples=30, stateful_step_count=30)
RunsMachine.TestCase.settings = BlockManagerMachine.TestCase.settings
TestBlockManager = BlockManagerMachine.TestCase
TestRuns = RunsMachine.TestCase


@pytest.fixture
def blocks() -> BlockManager:
    return BlockManager(8, 4, enable_prefix_cache=True)


def admit(blocks: BlockManager, tokens: list[int], salt: bytes = b"") -> Sequence:
    seq = make_sequence(tokens, salt)
    assert blocks.admit(seq, max_cached_tokens=len(tokens), spare=0)
    return seq


def test_only_full_blocks_are_shared_and_the_last_token_is_recomputed(blocks: BlockManager) -> None:
    first = admit(blocks, list(range(10)))
    compute(blocks, first)
    second = admit(blocks, [*range(8), 9, 9])
    assert second.num_computed_tokens == 8
    assert second.block_table[:2] == first.block_table[:2]
    third = admit(blocks, list(range(8)))
    assert third.num_computed_tokens == 4


def test_salts_keep_prefixes_apart(blocks: BlockManager) -> None:
    compute(blocks, admit(blocks, list(range(9)), b"tenant-a"))
    assert admit(blocks, list(range(9)), b"tenant-b").num_computed_tokens == 0


def test_same_block_after_another_prefix_is_not_a_hit(blocks: BlockManager) -> None:
    compute(blocks, admit(blocks, [1, 1, 1, 1, 2, 2, 2, 2, 3]))
    assert admit(blocks, [2, 2, 2, 2, 3]).num_computed_tokens == 0


def test_blocks_that_are_not_computed_are_not_found(blocks: BlockManager) -> None:
    admit(blocks, list(range(9)))
    assert admit(blocks, list(range(9))).num_computed_tokens == 0


def test_least_recently_used_prefix_goes_first_and_its_end_before_its_beginning(blocks: BlockManager) -> None:
    old, new = admit(blocks, [1] * 9), admit(blocks, [2] * 9)
    for seq in (old, new):
        compute(blocks, seq)
        blocks.free(seq)
    # 8 blocks, 4 of them cached: a sequence of 5 blocks takes the 4 empty ones and the end of the old prefix.
    other = admit(blocks, [3] * 18)
    blocks.free(other)
    assert admit(blocks, [1] * 9).num_computed_tokens == 4
    assert admit(blocks, [2] * 9).num_computed_tokens == 8


def test_a_used_prefix_becomes_recent(blocks: BlockManager) -> None:
    for tokens in ([1] * 9, [2] * 9, [1] * 9):
        seq = admit(blocks, tokens)
        compute(blocks, seq)
        blocks.free(seq)
    blocks.free(admit(blocks, [3] * 21))  # takes two cached blocks
    assert admit(blocks, [1] * 9).num_computed_tokens == 8


def test_spare_blocks_are_left_free(blocks: BlockManager) -> None:
    assert not blocks.admit(make_sequence([1] * 29), max_cached_tokens=29, spare=1)
    assert blocks.num_free == 8
    assert blocks.admit(make_sequence([1] * 28), max_cached_tokens=28, spare=1)


@pytest.mark.parametrize("is_full_of_content", [False, True])
def test_sequences_that_grow_in_turns_have_neighbours(is_full_of_content: bool) -> None:
    blocks = BlockManager(64, 4, enable_prefix_cache=True, block_run=4)
    if is_full_of_content:  # of sequences that came, grew in turns and went
        old = [admit(blocks, [place] * 5) for place in range(5)]
        for _ in range(10):
            for seq in old:
                seq.token_ids.extend([7] * 4)
                assert blocks.extend(seq)
        for seq in old:
            compute(blocks, seq)
            blocks.free(seq)
        assert blocks.num_cached > 50
    sequences = [admit(blocks, [100 + place] * 9) for place in range(5)]
    for _ in range(9):
        for seq in sequences:
            seq.token_ids.extend([8] * 4)
            assert blocks.extend(seq)
    blocks.check_integrity(sequences)
    pairs = [pair for seq in sequences for pair in pairwise(seq.block_table)]
    neighbours = sum(left + 1 == right for left, right in pairs)
    # Eleven pairs each, of which two are between runs. What lies alone between contents is given away first, and breaks
    # its run; without runs, sequences that grow in turns have hardly any neighbours.
    assert neighbours >= (25 if is_full_of_content else 5 * 9)


def test_runs_cost_no_block() -> None:
    """The rests of runs are free for others once all else is given away."""
    blocks = BlockManager(8, 4, enable_prefix_cache=True, block_run=4)
    sequences = [admit(blocks, [place] * 4) for place in range(8)]
    assert sorted(block for seq in sequences for block in seq.block_table) == list(range(8))
    assert [seq.block_table[0] for seq in sequences[:2]] == [0, 4]


def test_a_run_of_which_a_block_is_in_use_is_given_up_block_by_block() -> None:
    blocks = BlockManager(8, 4, enable_prefix_cache=True, block_run=4)
    old, other = admit(blocks, [1] * 16), admit(blocks, [2] * 16)
    for seq in (old, other):
        compute(blocks, seq)
        blocks.free(seq)
    user = admit(blocks, [1] * 5)  # shares the first block of the old run
    assert (user.block_table, user.num_computed_tokens) == ([0, 3], 4)
    assert admit(blocks, [3] * 24).block_table == [2, 1, 4, 5, 6, 7]


def test_pool_refuses_what_would_corrupt_it() -> None:
    pool = BlockPool(1)
    block = pool.take()
    with pytest.raises(RuntimeError, match="no free block"):
        pool.take()
    pool.release(block, keep=False)
    with pytest.raises(RuntimeError, match="released more often"):
        pool.release(block, keep=False)
