"""PrefixIndex against the definition of a common prefix."""

from hypothesis import given
from hypothesis import strategies as st

from scalellm.services.scheduler.prefix_index import BLOCK_TOKENS, PrefixIndex, block_hashes

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
    x, y = index.join("x"), index.join("y")
    index.record(block_hashes(a, b"salt"), x)
    assert index.matched_tokens(block_hashes(b + tail, b"salt"), x) == common_blocks(a, b) * BLOCK_TOKENS
    assert index.matched_tokens(block_hashes(b, b"salt"), y) == 0
    assert index.matched_tokens(block_hashes(b, b"other"), x) == 0


@given(routed=st.lists(st.tuples(prompts, st.integers(0, 2)), max_size=20), prompt=prompts, among=st.integers(1, 7))
def test_executors_are_divided_by_what_each_has(routed, prompt, among):
    index = PrefixIndex()
    places = [index.join(name) for name in "xyz"]
    for other, number in routed:
        index.record(block_hashes(other, b""), places[number])
    hashes = block_hashes(prompt, b"")
    divided = index.by_matched_tokens(hashes, among)
    assert [tokens for tokens, _ in divided] == sorted({tokens for tokens, _ in divided}, reverse=True)
    for number, place in enumerate(places):
        having = [other for other, to in routed if to == number]
        expected = BLOCK_TOKENS * max((common_blocks(prompt, other) for other in having), default=0)
        found = [tokens for tokens, mask in divided if mask >> place & 1]
        assert found == [expected] * (among >> place & 1)


@given(routed=st.lists(prompts, max_size=20), capacity=st.integers(1, 10))
def test_memory_is_bounded_and_the_latest_stays(routed, capacity):
    index = PrefixIndex(capacity)
    place = index.join("x")
    for prompt in routed:
        hashes = block_hashes(prompt, b"")
        index.record(hashes, place)
        assert len(index) <= 2 * capacity
        assert index.matched_tokens(hashes, place) >= min(len(hashes), capacity) * BLOCK_TOKENS


def test_who_comes_back_finds_what_it_had_until_places_are_short():
    index = PrefixIndex()
    hashes = block_hashes([1] * BLOCK_TOKENS, b"")
    stays, returns, lost = index.join("stays"), index.join("returns"), index.join("lost")
    for place in (stays, returns, lost):
        index.record(hashes, place)
    index.leave("returns")
    assert index.join("returns") == returns
    assert index.matched_tokens(hashes, returns) == BLOCK_TOKENS
    index.leave("lost")
    places = set()
    for number in range(1000):  # engines that come and go again and again
        places.add(index.join(f"passing {number}"))
        index.leave(f"passing {number}")
    assert max(places) < 100
    again = index.join("lost")
    assert index.matched_tokens(hashes, again) == 0
    assert index.matched_tokens(hashes, stays) == index.matched_tokens(hashes, returns) == BLOCK_TOKENS
    assert len(index) == 2
