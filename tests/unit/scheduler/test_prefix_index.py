"""PrefixIndex against the definition of a common prefix."""

from hypothesis import given
from hypothesis import strategies as st

from services.scheduler.prefix_index import BLOCK_TOKENS, PrefixIndex, block_hashes

prompts = st.lists(st.integers(0, 3), max_size=6).map(lambda blocks: [b for b in blocks for _ in range(BLOCK_TOKENS)])


def common_blocks(a, b):
    count = 0
    while (count + 1) * BLOCK_TOKENS <= min(len(a), len(b)) and (
        a[: (count + 1) * BLOCK_TOKENS] == b[: (count + 1) * BLOCK_TOKENS]
    ):
        count += 1
    return count


@given(a=prompts, b=prompts, tail=st.lists(st.just(9), max_size=BLOCK_TOKENS - 1))
def test_equal_hashes_mean_equal_prefixes(a, b, tail):
    index = PrefixIndex()
    index.record(block_hashes(a, b"salt"), "x")
    assert index.matched_tokens(block_hashes(b + tail, b"salt"), "x") == common_blocks(a, b) * BLOCK_TOKENS
    assert index.matched_tokens(block_hashes(b, b"salt"), "y") == 0
    assert index.matched_tokens(block_hashes(b, b"other"), "x") == 0


@given(routed=st.lists(prompts, max_size=20), capacity=st.integers(1, 10))
def test_memory_is_bounded_and_the_latest_stays(routed, capacity):
    index = PrefixIndex(capacity)
    for prompt in routed:
        hashes = block_hashes(prompt, b"")
        index.record(hashes, "x")
        assert len(index) <= capacity
        assert index.matched_tokens(hashes, "x") == min(len(hashes), capacity) * BLOCK_TOKENS
