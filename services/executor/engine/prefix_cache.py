"""The prefix cache: blocks by chained hashes of full blocks (as in vLLM v1), apart per salt."""

import hashlib
from array import array
from collections.abc import Sequence as ReadOnlySequence

_DIGEST_BYTES = 32


class PrefixCache:
    """Maps the hash of a prefix, `h(h(prefix before the block), the block's token ids)`, to the block that ends it.

    Hashes are 256-bit BLAKE2b chained from the salt, so equal hashes mean equal tokens under an equal salt and token
    ids need not be compared. The cache owns no block: an entry lives until the pool reuses its block.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self._block_size = block_size
        self._blocks: dict[bytes, int] = {}
        self._hashes: list[bytes | None] = [None] * num_blocks
        self.num_hashed_blocks = 0
        """Hashes computed since start."""

    def extend_hashes(
        self, hashes: list[bytes], token_ids: ReadOnlySequence[int], salt: bytes, num_blocks: int
    ) -> None:
        """Append to `hashes` those of the leading `num_blocks` full blocks that it lacks."""
        size = self._block_size
        for index in range(len(hashes), num_blocks):
            parent = hashes[-1] if hashes else hashlib.blake2b(salt, digest_size=_DIGEST_BYTES, person=b"salt").digest()
            block_tokens = array("q", token_ids[index * size : (index + 1) * size]).tobytes()
            hashes.append(hashlib.blake2b(parent + block_tokens, digest_size=_DIGEST_BYTES).digest())
            self.num_hashed_blocks += 1

    def lookup(self, block_hash: bytes) -> int | None:
        """Return the block with the end of the prefix that has this hash; None if it is not cached."""
        return self._blocks.get(block_hash)

    def register(self, block: int, block_hash: bytes) -> None:
        """Add a computed full block. A second block with the same content is not added, and its sequence keeps it."""
        if block_hash not in self._blocks:
            self._blocks[block_hash] = block
            self._hashes[block] = block_hash

    def is_registered(self, block: int) -> bool:
        """True if the block is in the cache, so that its content must not change."""
        return self._hashes[block] is not None

    def evict(self, block: int) -> None:
        """Remove the block, if it is in the cache."""
        block_hash = self._hashes[block]
        if block_hash is not None:
            del self._blocks[block_hash]
            self._hashes[block] = None

    def __len__(self) -> int:
        return len(self._blocks)

    def check_integrity(self) -> None:
        """Raise AssertionError unless both directions of the map agree; O(blocks), for tests."""
        known = {block_hash: block for block, block_hash in enumerate(self._hashes) if block_hash is not None}
        if known != self._blocks:
            raise AssertionError("prefix cache: hash -> block and block -> hash differ")
