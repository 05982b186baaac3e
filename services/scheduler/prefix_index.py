"""An index of the executors that have probably cached a prompt prefix."""

from __future__ import annotations

from collections.abc import Sequence

BLOCK_TOKENS = 64

_SPARE_PLACES = 64
"""Places that may be kept for instances that left, in addition to one per connected instance."""


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

    Built from this scheduler's own routing alone, so it may list blocks that an executor has evicted: a wrong entry
    costs time, never correctness. Executors are identified by instance, so a restarted one, whose cache is empty, has
    no entries, while one that reconnects after its link was cut has those from before.

    Each instance has a place: the number of its bit in masks. A block's hash maps to the mask of the executors that
    have the block, so one look-up per block answers for all executors. Masks are kept in two generations: new entries
    go into the younger one; when it is full, the older one is dropped and an empty younger one is begun.

    Args:
        capacity: (Block, executor) pairs per generation: at least this many of the latest pairs are remembered, and at
            most twice as many.
    """

    def __init__(self, capacity: int = 131_072) -> None:
        self._capacity = capacity
        self._young: dict[int, int] = {}
        self._old: dict[int, int] = {}
        self._num_young = self._num_old = 0
        self._places: dict[str, int] = {}
        self._free_places: list[int] = []
        self._joined: set[str] = set()

    def __len__(self) -> int:
        return self._num_young + self._num_old

    def join(self, instance_id: str) -> int:
        """Register an instance that connected or came back. Returns its place."""
        place = self._places.get(instance_id)
        if place is None:
            if not self._free_places and len(self._places) >= 2 * len(self._joined) + _SPARE_PLACES:
                self._forget_absent()
            place = self._free_places.pop() if self._free_places else len(self._places)
            self._places[instance_id] = place
        self._joined.add(instance_id)
        return place

    def leave(self, instance_id: str) -> None:
        """Record that an instance disconnected. Its entries are kept for a while, as it may come back."""
        self._joined.discard(instance_id)

    def record(self, hashes: Sequence[int], place: int) -> None:
        """Record that a prompt with these block hashes was routed to the executor with this place."""
        bit = 1 << place
        # Last block first, so that a prefix ages out from its end, as in the executor's own cache.
        for block in reversed(hashes):
            mask = self._young.get(block, 0)
            if not mask & bit:
                if self._num_young == self._capacity:
                    self._old, self._num_old = self._young, self._num_young
                    self._young, self._num_young, mask = {}, 0, 0
                self._young[block] = mask | bit
                self._num_young += 1

    def matched_tokens(self, hashes: Sequence[int], place: int) -> int:
        """Return the number of leading prompt tokens that the executor with this place has probably cached."""
        return self.by_matched_tokens(hashes, 1 << place)[0][0]

    def by_matched_tokens(self, hashes: Sequence[int], among: int) -> list[tuple[int, int]]:
        """Divide executors by how much of a prompt they have probably cached.

        Args:
            hashes: `block_hashes` of the prompt.
            among: Mask of the executors; not 0.

        Returns:
            Pairs of a number of leading prompt tokens and the mask of the executors that have cached exactly so many,
            the most tokens first. Each executor is in one of the masks.
        """
        young, old = self._young, self._old
        found = []
        matched = 0
        for block in hashes:
            having = among & (young.get(block, 0) | old.get(block, 0))
            if having != among:
                found.append((matched, among ^ having))
                among = having
                if not among:
                    break
            matched += BLOCK_TOKENS
        if among:
            found.append((matched, among))
        found.reverse()
        return found

    def _forget_absent(self) -> None:
        """Free the places of instances that left, and drop their entries."""
        kept = 0
        for instance_id, place in tuple(self._places.items()):
            if instance_id in self._joined:
                kept |= 1 << place
            else:
                del self._places[instance_id]
                self._free_places.append(place)
        self._young = {block: mask & kept for block, mask in self._young.items() if mask & kept}
        self._old = {block: mask & kept for block, mask in self._old.items() if mask & kept}
        self._num_young = sum(mask.bit_count() for mask in self._young.values())
        self._num_old = sum(mask.bit_count() for mask in self._old.values())
