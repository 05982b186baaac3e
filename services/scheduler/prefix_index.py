"""Which executor has probably cached which prompt prefix."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

BLOCK_TOKENS = 64


def block_hashes(token_ids: Sequence[int], salt: bytes) -> list[int]:
    """Chained hashes of the full blocks of a prompt: equal hashes mean equal prefixes.

    Args:
        token_ids: The prompt.
        salt: Prefixes are shared within one salt only.

    Returns:
        One hash per full block of BLOCK_TOKENS tokens. Meaningful in this process only.
    """
    hashes = []
    parent = hash(salt)
    for start in range(0, len(token_ids) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        parent = hash((parent, *token_ids[start : start + BLOCK_TOKENS]))
        hashes.append(parent)
    return hashes


class PrefixIndex:
    """An approximate map from prompt prefixes to executors.

    Built from this scheduler's own routing alone, so it may claim what an executor has evicted: a wrong guess costs
    time, never correctness. Executors are named by instance, so that a restarted one, whose cache is empty, matches
    nothing; what was known of the old instance ages out.

    Args:
        capacity: Most (block, executor) pairs; the least recently routed are forgotten first.
    """

    def __init__(self, capacity: int = 131_072) -> None:
        self._capacity = capacity
        self._pairs: OrderedDict[tuple[int, str], None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._pairs)

    def record(self, hashes: Sequence[int], instance_id: str) -> None:
        """A prompt with these block hashes was routed to this executor."""
        pairs = self._pairs
        # Last block first: when a prefix ages out it does so from its end, as in the executor's own cache.
        for block in reversed(hashes):
            pairs[block, instance_id] = None
            pairs.move_to_end((block, instance_id))
        while len(pairs) > self._capacity:
            pairs.popitem(last=False)

    def matched_tokens(self, hashes: Sequence[int], instance_id: str) -> int:
        """Leading prompt tokens that this executor has probably cached."""
        matched = 0
        for block in hashes:
            if (block, instance_id) not in self._pairs:
                break
            matched += BLOCK_TOKENS
        return matched
