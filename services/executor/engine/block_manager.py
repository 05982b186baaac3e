"""Cache blocks and the sequences that own them: allocation, prefix sharing, copy-on-write."""

from collections import Counter
from collections.abc import Iterable

from scalellm.services.executor.engine.block_pool import BlockPool
from scalellm.services.executor.engine.prefix_cache import PrefixCache
from scalellm.services.executor.engine.sequence import Sequence


class BlockManager:
    """Gives sequences their blocks. Every operation either succeeds as a whole or changes nothing.

    Block tables are append-only, so the runner copies only what is new; the one exception is copy-on-write, which
    replaces the block that a sequence is about to write while others can still see it. Blocks come in runs of
    `block_run` neighbours where that can be (`BlockPool`).
    """

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_cache: bool, block_run: int = 1) -> None:
        self.block_size = block_size
        self._cache = PrefixCache(num_blocks, block_size)
        self._pool = BlockPool(num_blocks, block_run, self._cache.evict)
        self._enable_prefix_cache = enable_prefix_cache
        self._copies: list[tuple[int, int]] = []

    @property
    def num_blocks(self) -> int:
        """Total number of blocks."""
        return self._pool.num_blocks

    @property
    def num_free(self) -> int:
        """Number of blocks that can be allocated, cached ones that no sequence holds included."""
        return self._pool.num_free

    @property
    def num_cached(self) -> int:
        """Number of blocks that are in the prefix cache."""
        return len(self._cache)

    @property
    def num_hashed_blocks(self) -> int:
        """Block hashes computed since start."""
        return self._cache.num_hashed_blocks

    def blocks_for(self, num_tokens: int) -> int:
        """Return how many blocks hold that many tokens."""
        return -(-num_tokens // self.block_size)

    def admit(self, seq: Sequence, *, max_cached_tokens: int, spare: int) -> bool:
        """Allocate all blocks that the tokens of a sequence need, sharing those of a cached prefix.

        Args:
            seq: A sequence without blocks.
            max_cached_tokens: Most tokens to take from the prefix cache, in full blocks. They count as computed.
            spare: Blocks to leave free.

        Returns:
            False, with nothing changed, if there are too few free blocks.
        """
        cached = self._find_prefix(seq, max_cached_tokens)
        needed = self.blocks_for(seq.num_tokens) - len(cached)
        revived = sum(self._pool.ref_counts[block] == 0 for block in cached)
        if needed + revived + spare > self._pool.num_free:
            return False
        for block in cached:
            self._pool.share(block)
        seq.num_published_blocks = len(cached)
        seq.num_computed_tokens = len(cached) * self.block_size
        seq.block_table = cached
        self._append(seq, needed)
        return True

    def extend(self, seq: Sequence) -> bool:
        """Allocate blocks for the uncomputed tokens of a running sequence, and copy a shared block that they are
        written to. Returns False, with nothing changed, if there are too few free blocks.
        """
        table = seq.block_table
        first = seq.num_computed_tokens // self.block_size
        needed = self.blocks_for(seq.num_tokens) - len(table)
        # Sharing ends with the block that holds the fork's last common token, so only the first can be shared.
        copy = first < len(table) and self._is_shared(table[first])
        if needed + copy > self._pool.num_free:
            return False
        if copy:
            source, target = table[first], self._pool.take()
            # The reference to the source is kept until the copy has run, so that the block is not reused before.
            self._copies.append((source, target))
            table[first] = target
            seq.num_sent_blocks = min(seq.num_sent_blocks, first)
        self._append(seq, needed)
        return True

    def extend_ahead(self, seq: Sequence, num_tokens: int, *, spare: int) -> int:
        """Allocate blocks for drafts, up to the first `num_tokens` tokens of a running sequence, leaving `spare` blocks
        free. Returns the number of tokens for which its blocks have room.
        """
        needed = self.blocks_for(num_tokens) - len(seq.block_table)
        self._append(seq, max(0, min(needed, self._pool.num_free - spare)))
        return len(seq.block_table) * self.block_size

    def num_shared_blocks(self, seq: Sequence) -> int:
        """Return the number of leading blocks that other sequences hold too and that are in the prefix cache."""
        for index, block in enumerate(seq.block_table):
            if self._pool.ref_counts[block] == 1 or not self._cache.is_registered(block):
                return index
        return len(seq.block_table)

    def take_copies(self) -> list[tuple[int, int]]:
        """Return the (source, target) block copies that must run before the step; called once per step."""
        copies, self._copies = self._copies, []
        for source, _ in copies:
            self._release(source)
        return copies

    def fork(self, parent: Sequence, child: Sequence, num_tokens: int) -> None:
        """Let a child without blocks share the parent's blocks of the first `num_tokens` computed tokens."""
        child.block_table = parent.block_table[: self.blocks_for(num_tokens)]
        for block in child.block_table:
            self._pool.share(block)
        full = num_tokens // self.block_size
        child.block_hashes = parent.block_hashes[:full]
        child.num_published_blocks = min(parent.num_published_blocks, full)
        child.num_computed_tokens = num_tokens

    def publish(self, seq: Sequence, num_tokens: int) -> None:
        """Register the full blocks of the first `num_tokens` tokens in the prefix cache; O(new blocks).

        The steps that computed these tokens must have been processed. Blocks of a step in flight cannot be registered,
        because its last token is not known yet and the step may have failed.
        """
        full = num_tokens // self.block_size
        if full <= seq.num_published_blocks or not self._enable_prefix_cache:
            return
        self._cache.extend_hashes(seq.block_hashes, seq.token_ids, seq.group.request.cache_salt, full)
        for index in range(seq.num_published_blocks, full):
            self._cache.register(seq.block_table[index], seq.block_hashes[index])
        seq.num_published_blocks = full

    def free(self, seq: Sequence) -> None:
        """Take a sequence's blocks back; published ones can still be found until they are reused."""
        # The last blocks of a prefix come first in eviction order, because its beginning serves more requests.
        for block in reversed(seq.block_table):
            self._release(block)
        # A step in flight may still write to the blocks; whatever uses them next is launched, and so runs, after it.
        seq.block_table = []
        seq.num_computed_tokens = seq.num_published_blocks = seq.num_sent_blocks = 0

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Raise AssertionError unless the pool's reference counts equal those of the `sequences` that hold blocks; for
        tests.
        """
        expected = Counter(block for seq in sequences for block in seq.block_table)
        expected.update(source for source, _ in self._copies)
        free = self._pool.free_blocks()
        actual = {block: count for block, count in enumerate(self._pool.ref_counts) if count}
        if actual != dict(expected):
            raise AssertionError(f"reference counts {actual} differ from block tables {dict(expected)}")
        if len(free) != self._pool.num_free or len(set(free)) != len(free):
            raise AssertionError(f"free list {free} is not {self._pool.num_free} distinct blocks")
        if set(free) | set(actual) != set(range(self.num_blocks)) or set(free) & set(actual):
            raise AssertionError("blocks are not either free or referenced")
        self._cache.check_integrity()

    def _find_prefix(self, seq: Sequence, max_cached_tokens: int) -> list[int]:
        found: list[int] = []
        if not self._enable_prefix_cache:
            return found
        # The last token is always recomputed: its logits give the next token.
        for index in range(min(max_cached_tokens, len(seq.token_ids) - 1) // self.block_size):
            self._cache.extend_hashes(seq.block_hashes, seq.token_ids, seq.group.request.cache_salt, index + 1)
            block = self._cache.lookup(seq.block_hashes[index])
            if block is None:
                break
            found.append(block)
        return found

    def _is_shared(self, block: int) -> bool:
        # A pending copy's reference does not make the block shared: the copy runs before anything is written.
        count = self._pool.ref_counts[block]
        if count > 1 and self._copies:
            count -= sum(source == block for source, _ in self._copies)
        return count > 1 or self._cache.is_registered(block)

    def _append(self, seq: Sequence, count: int) -> None:
        for _ in range(count):
            seq.block_table.append(self._pool.take(seq.block_table[-1] if seq.block_table else None))

    def _release(self, block: int) -> None:
        self._pool.release(block, keep=self._cache.is_registered(block))
